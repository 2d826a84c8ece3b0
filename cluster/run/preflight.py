"""What can be refused before anything expensive starts: models, tasks, router, run folder."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config import ConfigError, RunConfig
from cluster.run import hub
from cluster.run.asked import answer_tokens
from cluster.run.models import check_references, model_path
from cluster.run.trained import router_folder, saved_experts
from cluster.watch import wandb_run
from cluster.zoo.recipe import load_recipe
from experts.architectures import check_expert, check_policy
from experts.chat import Chat, ChatError, ChatSettings, Messages, worded
from experts.config import EngineConfig, ExpertConfig
from experts.loading import check_end_token, describe, load_tokenizer
from experts.plugins import load_plugin
from experts.router import router_class
from experts.vllm_install import check_installed, is_for_cpus, supports
from learner.algorithms import ALGORITHMS
from rewards.jail import kernel
from rewards.sources import Task, of_length
from rollout.text import with_answers
from rollout.types import Message

HALF_PRECISION = ("awq", "gptq", "fp8")  # quantised weights that vLLM runs in no other dtype
LONGEST = 100  # prompts with most characters, among which the one with most tokens is looked for


def check_names(config: RunConfig) -> None:
    """Refuses unknown plug-ins, routers and zoo worlds: needs no model.

    Raises:
        ValueError: one line, naming the key and the remedy.
    """
    if config.tracking.wandb:
        wandb_run.check()
    kind, states = router_class(config.router.kind), config.router.states
    if states != "own" and getattr(kind, "asks", "states") == "nothing":
        raise ConfigError(
            f"router.states: {states} changes nothing for kind: {config.router.kind}, which asks nothing of the experts"
        )
    if config.algorithm.kind not in ALGORITHMS:
        load_plugin(config.algorithm.kind, "algorithm.kind", ALGORITHMS)
    if config.router.init and not hub.is_on_hub(config.router.init):  # nothing is downloaded for a plan
        _check_experts(config, router_folder(config.router.init))
    check_references(config)
    if config.data.split_by == "question":
        _check_zoo_splits(config)


def _check_zoo_splits(config: RunConfig) -> None:
    """Models of the zoo must not have been trained on questions that the run holds out."""
    keys = ("split_by", "validation", "test")
    for key, engine in config.engines().items():
        if not engine.model.startswith("zoo/") or getattr(engine, "weights", "stored") == "random":
            continue
        theirs = load_recipe(engine.model.split("/")[1]).data
        if other := [name for name in keys if getattr(theirs, name) != getattr(config.data, name)]:
            raise ConfigError(
                f"{key}.model: {engine.model} was trained on questions that this recipe holds out: its world has "
                f"{other[0]}: {getattr(theirs, other[0])}; set data.{other[0]} to that, or take another model"
            )


def check_models(config: RunConfig) -> None:
    """Refuses models that are absent or incomplete, cannot end an answer or cannot do what is asked of them.

    The zoo must be built.

    Raises:
        ValueError: one line, naming the key and the remedy.
    """
    described = {}
    for key, reference in config.models().items():
        try:
            described[key] = describe(model_path(reference))
            check_end_token(model_path(reference))
            engine = config.engines()[key.removesuffix(".model")]
            check = check_policy if key == "policy.model" else check_expert
            check(model_path(reference), engine.engine, bool(engine.gpus))
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    _check_encoders(config, [described[f"experts.{index}.model"] for index in range(len(config.experts))])
    for key, engine in config.engines().items():
        model = described[f"{key}.model"]
        try:
            chat_of(config, engine)
        except ChatError as error:
            raise ConfigError(f"{key}.{error}") from error
        _check_quantized(key, engine, model)
        if engine.engine == "vllm":
            _check_vllm(key, engine, model)
        if isinstance(engine, ExpertConfig):
            _check_expert(key, engine, model, config)
    if config.data.max_prompt_tokens is not None:
        _check_policy_length(config, described["policy.model"], "data.max_prompt_tokens", config.data.max_prompt_tokens)


def _check_encoders(config: RunConfig, models: Sequence[Mapping[str, Any]]) -> None:
    """Encoders read and cannot answer."""
    template, encoders = config.router.text.template, []
    for index, (expert, model) in enumerate(zip(config.experts, models, strict=True)):
        if not model["encoder"]:
            continue
        encoders.append(expert.name)
        what = f"experts.{index}: {expert.model} is an encoder ({model['architecture']}), which reads and cannot answer"
        if getattr(router_class(config.router.kind), "asks", "states") == "answers":
            raise ConfigError(f"{what}: router.kind: {config.router.kind} asks for answers; take this expert out")
        if f"{{{expert.name}}}" in template:
            raise ConfigError(f"{what}: take {{{expert.name}}} out of router.text.template")
        if expert.engine == "vllm":
            raise ConfigError(f"experts.{index}.engine: {expert.model} is an encoder: take engine: transformers")
    if config.router.warm_start.steps and len(encoders) == len(config.experts):
        raise ConfigError(
            f"router.warm_start learns from the experts' answers, and {', '.join(encoders)} cannot answer (encoders): "
            "set router.warm_start.steps to 0, or add an expert that can"
        )


def check_start(config: RunConfig) -> None:
    """Refuses a saved router that cannot serve these models.  The zoo must be built; of the hub, it is downloaded.

    Raises:
        ConfigError: one line, naming the key.
    """
    if config.router.init:
        folder = router_folder(config.router.init)
        _check_experts(config, folder)
        _check_widths(config, folder, model_facts(config))


def _check_experts(config: RunConfig, folder: Path) -> None:
    """With `router.add_expert`, the others must be those that the saved router knows."""
    new, saved = config.router.add_expert, saved_experts(folder)
    if known := [name for name in new if name in saved]:
        raise ConfigError(f"router.add_expert: {config.router.init} knows expert {known[0]!r} already: leave it out")
    others = [expert.name for expert in config.experts if expert.name not in new]
    if new and sorted(others) != sorted(saved):
        raise ConfigError(
            f"router.add_expert: {config.router.init} belongs to experts {saved}, and without the new ones this run "
            f"has {others}: name the same ones, and every other in router.add_expert"
        )


def _check_quantized(key: str, config: EngineConfig, model: Mapping[str, Any]) -> None:
    method = model["quantized"]
    if not method:
        return
    what = f"{config.model} is quantised ({method})"
    if key == "policy":
        raise ConfigError(f"{key}.model: {what}, and the learner needs gradients through it: take it as it was before")
    if config.engine == "transformers":
        raise ConfigError(f"{key}.model: {what}: take {key}.engine: vllm, or the model as it was before")
    if config.dtype == "float32" and any(name in method for name in HALF_PRECISION):
        raise ConfigError(f"{key}.dtype: {what}, which vLLM does not run in float32: take float16 or bfloat16")


def _check_expert(key: str, config: ExpertConfig, model: Mapping[str, Any], run: RunConfig) -> None:
    layers = model["layers"]  # and the embeddings before them
    if not -layers - 1 <= config.layer <= layers:
        raise ConfigError(
            f"{key}.layer: {config.layer} is none of the {layers} layers of {config.model}: take 0 (the embeddings) to "
            f"{layers}, or -1 (the last) to {-layers - 1}"
        )
    parts = {f"{key}.max_tokens": config.max_tokens}
    if config.engine == "vllm":  # in evaluations it also answers, and vLLM refuses a prompt that leaves no room
        named = {
            "sampling.max_new_tokens": run.sampling.max_new_tokens,
            "router.text.max_new_tokens": answer_tokens(run),
        }
        longest = max(named, key=lambda name: named[name])
        parts[longest] = named[longest]
    _check_length(key, config, model, parts)


def _check_policy_length(config: RunConfig, model: Mapping[str, Any], what: str, prompt_tokens: int) -> None:
    # In front of a prompt stands the prefix or, where the experts' answers are measured as text, these.
    template, names = config.router.text.template, [expert.name for expert in config.experts]
    answers = sum(template.count(f"{{{name}}}") for name in names) + template.count("{answers}") * len(names)
    slots = {
        "router.latents": config.router.latents,
        f"{answers} experts' answers in router.text.template (router.text.max_new_tokens each)": answers
        * answer_tokens(config)
        + _template_tokens(config)
        + (template.count("{prompt}") - 1) * prompt_tokens,
    }
    widest = max(slots, key=lambda name: slots[name])
    parts = {
        what: prompt_tokens,
        widest: slots[widest],
        "sampling.max_new_tokens": config.sampling.max_new_tokens,
    }
    _check_length("policy", config.policy, model, parts)


def _template_tokens(config: RunConfig) -> int:
    """What the template puts around a prompt besides the experts' answers, as the policy counts it."""
    tokenizer, gap = load_tokenizer(model_path(config.policy.model)), "\0"
    asked = [Message(role="user", content=gap)]
    (filled,) = with_answers(config.router.text.template, asked, {expert.name: gap for expert in config.experts})
    # Piece by piece: what stands around a gap is not one token.
    return sum(len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in filled["content"].split(gap))


def _check_length(key: str, config: EngineConfig, model: Mapping[str, Any], parts: Mapping[str, int]) -> None:
    """vLLM ends an answer where its limit is, without a word."""
    limit = config.max_model_tokens or model["longest"]
    if limit and sum(parts.values()) > limit:
        said = " + ".join(f"{name} {count}" for name, count in parts.items())
        whose = f"{key}.max_model_tokens" if config.max_model_tokens else f"the positions of {config.model}"
        raise ConfigError(f"{said} is more than {whose}, {limit}: prompts or answers would be cut short")


def _check_vllm(key: str, config: EngineConfig, model: Mapping[str, Any]) -> None:
    try:
        check_installed()
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from error
    if not config.gpus and not is_for_cpus():
        raise ConfigError(f"{key}.gpus: vLLM's build for GPUs is installed, and no GPU is asked for: give {key}.gpus=1")
    if not supports(model["architecture"]):
        raise ConfigError(
            f"{key}.engine: vLLM has no {model['architecture']} ({config.model}): take engine: transformers"
        )
    if model["heads"] % config.tensor_parallel:
        raise ConfigError(
            f"{key}.tensor_parallel: {config.tensor_parallel} does not divide the {model['heads']} attention heads of "
            f"{config.model}"
        )
    if config.max_model_tokens and model["longest"] and config.max_model_tokens > model["longest"]:
        raise ConfigError(
            f"{key}.max_model_tokens: {config.max_model_tokens} is more than the {model['longest']} positions of "
            f"{config.model}"
        )


def _check_widths(config: RunConfig, folder: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """A saved router must be as wide as the models it shall serve."""
    saved = json.loads((folder / "router.json").read_text())
    width = models["policy.model"]["embedding_size"]
    if saved["policy"]["width"] != width:
        raise ConfigError(
            f"router.init: {config.router.init} makes prefixes of width {saved['policy']['width']}, and "
            f"policy.model {config.policy.model} is {width} wide"
        )
    reading = [(i, expert) for i, expert in enumerate(config.experts) if expert.name not in config.router.add_expert]
    if config.router.add_expert:  # names decide; without it their order must be the same
        order = saved_experts(folder)
        reading.sort(key=lambda item: order.index(item[1].name))
    for (index, expert), was in zip(reading, saved["experts"], strict=False):
        facts = models[f"experts.{index}.model"]
        width = facts["hidden_size"]
        if was["width"] not in (width, facts["embedding_size"]):
            raise ConfigError(
                f"router.init: {config.router.init} reads states of width {was['width']} from expert {was['name']}, "
                f"and experts.{index}.model {expert.model} is {width} wide"
            )


def model_facts(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What `describe` says of every model, by configuration key."""
    return {key: describe(model_path(reference)) for key, reference in config.models().items()}


def check_jail(config: RunConfig, tasks: Iterable[str], note: Callable[[str], None]) -> None:
    """Says which verifiers run outside the jail, and what it lacks on this machine.

    Raises:
        ConfigError: when `rewards.jail_exempt` names no task of the run, or this machine lacks what is required.
    """
    rewards, tasks = config.rewards, list(tasks)
    if unknown := [name for name in rewards.jail_exempt if name not in tasks]:
        raise ConfigError(f"rewards.jail_exempt: {unknown[0]!r} is no task of this run, which has {', '.join(tasks)}")
    missing = kernel().missing
    if rewards.jail == "off":
        note("rewards.jail: off: verifiers run outside the jail, with this user's files, environment and network")
    elif missing and rewards.jail == "require":
        raise ConfigError(f"rewards.jail: require, but this machine's kernel has no {' and no '.join(missing)}")
    elif missing:
        note(f"this machine's kernel has no {' and no '.join(missing)}: verifiers are confined by limits and the rest")
    if rewards.jail != "off" and rewards.jail_exempt:
        note(f"outside the jail, as rewards.jail_exempt says: verifiers of {', '.join(rewards.jail_exempt)}")


def check_prompts(config: RunConfig, tasks: Mapping[str, Task], note: Callable[[str], None]) -> dict[str, Task]:
    """Leaves out prompts that are too long for `data.max_prompt_tokens`, and says how many.  The zoo must be built.

    Raises:
        ValueError: one line, naming the task and the remedy; also when nothing limits prompts and the longest leave
            no room for an answer.
    """
    path, chat = model_path(config.policy.model), chat_of(config, config.policy)
    check_parts(config, tasks)
    for key, engine in config.engines().items():
        own = chat_of(config, engine)
        _check_template(config, key, engine, own, next(iter(tasks.values())))
        if config.data.date is None and own.prints_date:
            note(f"{key}.model: its chat template prints the date, and this run has none (data.date): it reads today's")
    if config.data.max_prompt_tokens is None:
        texts = {p.text: p for task in tasks.values() for p in (*task.train, *task.validation, *task.test)}
        longest = heapq.nlargest(LONGEST, texts.values(), key=lambda prompt: len(prompt.text))
        tokens = max(len(chat.tokenize(prompt.messages)) for prompt in longest)
        _check_policy_length(config, describe(path), "the longest prompt (limited by data.max_prompt_tokens)", tokens)
        return dict(tasks)
    kept, lost = of_length(tasks, config.data, lambda prompt: len(chat.tokenize(prompt.messages)))
    for name, count in lost.items():
        note(f"task {name}: {count} prompts of more than {config.data.max_prompt_tokens} tokens are left out")
    return kept


def check_parts(config: RunConfig, tasks: Mapping[str, Task]) -> None:
    """Makes sure that an expert with `parts` is asked these, in every prompt of the run.

    Raises:
        ConfigError: naming the expert, the task and the question that is cut wrongly.
    """
    style = config.prompt_style
    for index, expert in enumerate(config.experts):
        prompts = (prompt for task in tasks.values() for pool in task.pools.values() for prompt in pool)
        for prompt in prompts if expert.parts else ():
            own = [part["question"] for part in prompt.payload.get("parts", ()) if part["task"] in expert.parts]
            if own and style.question(prompt.messages[-1]["content"], expert.parts) != "\n".join(own):
                raise ConfigError(
                    f"experts.{index}.parts: in a prompt of task {prompt.task!r} nobody can tell where the question "
                    f"{own[0][:60]!r} ends or begins: give the task a template whose own words stand in no question"
                )


def chat_of(config: RunConfig, engine: EngineConfig) -> Chat:
    """How a model of the run reads conversations.

    Raises:
        ChatError: when its chat template does not take its `chat_template_kwargs`.
    """
    settings = ChatSettings(engine.chat_template_kwargs, config.data.date)
    return Chat(load_tokenizer(model_path(engine.model)), settings)


def _check_template(config: RunConfig, key: str, engine: EngineConfig, chat: Chat, task: Task) -> None:
    """Every model must be able to render what it will be shown."""
    messages: Messages = next(iter((*task.train, *task.test))).messages
    without = "without data.system there is no system message"
    if isinstance(engine, ExpertConfig):
        messages = worded(messages, engine.template, engine.system, config.prompt_style, engine.parts)
        without = f'{key}.system: "" leaves out the system message'
    try:
        chat.tokenize(messages)
    except ChatError as error:
        raise ConfigError(f"{key}.model: {error}; {without}") from error


def print_plan(config: RunConfig, console: Console) -> None:
    """The resolved configuration and the plan of workers."""
    console.print(config.as_yaml(), highlight=False, markup=False)
    table = Table("stage", "workers", "model", "threads", "CPUs", "GPUs", title="plan of workers")
    for row in plan_rows(config):
        table.add_row(row.stage, str(row.workers), row.model, row.threads, f"{row.cpus:g}", f"{row.gpus:g}")
    console.print(table)


@dataclass(frozen=True)
class PlanRow:
    """One kind of worker, as `--dry-run` prints it."""

    stage: str
    workers: int
    model: str
    threads: str
    cpus: float
    gpus: float


def plan_rows(config: RunConfig) -> list[PlanRow]:
    """The plan of workers."""
    p, c, new = config.policy, config.learner, config.router.add_expert
    shared = config.threads or "shared"
    trained = f"router, of which only {', '.join(new)} trains" if new else "router"
    experts = [
        PlanRow(f"Expert({e.name})", e.replicas, e.model, str(e.threads or shared), e.cpus, e.gpus)
        for e in config.experts
    ]
    return [
        *experts,
        PlanRow("Rollout", p.workers, p.model, str(p.threads or shared), p.cpus, p.gpus),
        PlanRow("Reward", config.rewards.workers, "verifiers", "1", 0, 0),
        PlanRow(
            "Learner",
            c.ranks,
            f"{p.model} + {trained} (ZeRO {c.zero_stage})",
            str(c.threads or shared),
            c.cpus,
            c.gpus,
        ),
    ]
