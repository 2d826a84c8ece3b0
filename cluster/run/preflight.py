"""What can be refused before anything expensive starts: models, tasks, router, run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ConfigError, RunConfig
from cluster.zoo import paths as zoo
from experts.loading import check_end_token, describe, load_tokenizer, tokenize
from experts.plugins import load_plugin
from learner.algorithms import ALGORITHMS
from rewards.sources import Task, of_length


def model_path(reference: str) -> str:
    """Where a configuration's model is: a folder of the zoo, or the reference itself."""
    return str(zoo.resolve(reference)) if zoo.is_zoo(reference) else reference


def check_names(config: RunConfig) -> None:
    """Refuses unknown plug-ins, routers and zoo worlds: needs no model.

    Raises:
        ValueError: one line, naming the key and the remedy.
    """
    if config.router.kind != "perceiver":
        load_plugin(config.router.kind, "router.kind")
    if config.algorithm.kind not in ALGORITHMS:
        load_plugin(config.algorithm.kind, "algorithm.kind")
    if config.router.init and not (Path(config.router.init) / "router.json").is_file():
        raise ConfigError(
            f"router.init: {config.router.init!r} holds no router.json: give a folder with a saved router"
        )
    for reference in config.models().values():
        if zoo.is_zoo(reference):
            zoo.worlds_named_by([reference])


def check_models(config: RunConfig) -> None:
    """Refuses models that are absent, incomplete or cannot end an answer.  The zoo must be built.

    Raises:
        ValueError: one line, naming the model and the remedy.
    """
    for key, reference in config.models().items():
        try:
            describe(model_path(reference))
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    check_end_token(model_path(config.policy.model))


def check_prompts(config: RunConfig, tasks: Mapping[str, Task], note: Callable[[str], None]) -> dict[str, Task]:
    """Leaves out prompts that are too long for `data.max_prompt_tokens`, and says how many.  The zoo must be built.

    Raises:
        ValueError: one line, naming the task and the remedy.
    """
    if config.data.max_prompt_tokens is None:
        return dict(tasks)
    tokenizer = load_tokenizer(model_path(config.policy.model))
    kept, lost = of_length(tasks, config.data, lambda prompt: len(tokenize(tokenizer, prompt.messages)))
    for name, count in lost.items():
        note(f"task {name}: {count} prompts of more than {config.data.max_prompt_tokens} tokens are left out")
    return kept


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
    p, c = config.policy, config.learner
    experts = [
        PlanRow(f"Expert({e.name})", 1, e.model, str(e.threads or "shared"), e.cpus, e.gpus) for e in config.experts
    ]
    return [
        *experts,
        PlanRow("Rollout", p.workers, p.model, str(p.threads or "shared"), p.cpus, p.gpus),
        PlanRow("Reward", config.rewards.workers, "verifiers", "1", 0, 0),
        PlanRow(
            "Learner", c.ranks, f"{p.model} + router (ZeRO {c.zero_stage})", str(c.threads or "shared"), c.cpus, c.gpus
        ),
    ]
