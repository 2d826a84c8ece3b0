"""What is refused before anything expensive starts, with the key and the numbers, and what is not."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ConfigError, RunConfig, load, parse
from cluster.run import preflight
from cluster.serve.opening import Ready
from experts.chat import Chat
from experts.loading import ModelError, load_frozen, load_tokenizer
from rewards.sources import build_tasks
from rewards.splits import questions_of
from tests import architectures
from tests.experts.test_bidirectional import make_bert
from tests.models import make

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
VLLM = {"engine": "vllm", "dtype": "float16"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two layers and 512 positions, some of which cannot be used."""
    folder = tmp_path_factory.mktemp("models")
    make(folder / "good", "qwen2")
    make(folder / "endless", "qwen2", end=False)
    make_bert(folder / "bert")
    shutil.copytree(folder / "good", folder / "unreadable")
    (folder / "unreadable" / "tokenizer.json").write_text('{"version": "1.0"}')
    for method in ("awq", "compressed-tensors"):
        shutil.copytree(folder / "good", folder / method)
        values = json.loads((folder / "good" / "config.json").read_text())
        quantization = {"quant_method": method, "bits": 4, "group_size": 16, "zero_point": True}
        (folder / method / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    return folder


@pytest.fixture(autouse=True)
def vllm_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """And has every model; importing it takes seconds."""
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    monkeypatch.setattr(preflight, "supports", lambda architecture: True)


def config(models: Path, expert: dict[str, Any], policy: dict[str, Any], **settings: Any) -> RunConfig:
    """A run with one expert."""
    named = [{"model": "good"} | values for values in (expert, policy)]
    expert, policy = ({**values, "model": str(models / values["model"])} for values in named)
    task = {"name": "digits", "plugin": "tests.plugins:Digits"}
    values = {
        "run": "r",
        "steps": 1,
        "data": {"tasks": [task]} | settings.pop("data", {}),
        "experts": [{"name": "e"} | expert],
        "policy": policy,
        "sampling": {"max_new_tokens": 10},
    }
    return parse(values | settings, "test")


@pytest.mark.parametrize(
    ("expert", "policy", "message"),
    [
        ({"layer": 99}, {}, r"experts.0.layer: 99 is none of the 2 layers of .*good: take 0 .* to 2, or -1 .* to -3"),
        ({"layer": -4}, {}, "experts.0.layer: -4 is none"),
        ({"model": "endless"}, {}, "experts.0.model: .* no end token"),
        ({}, {"model": "endless"}, "policy.model: .* no end token"),
        ({"model": "unreadable"}, {}, "experts.0.model: .*unreadable': its tokenizer cannot be read: KeyError"),
        ({}, {"model": "awq"}, r"policy.model: .*awq is quantised \(awq\), and the learner needs gradients"),
        ({}, {"model": "awq"} | VLLM, "policy.model: .* the learner needs gradients"),
        ({"model": "awq"}, {}, r"experts.0.model: .*awq is quantised \(awq\): take experts.0.engine: vllm"),
        ({"model": "awq", "engine": "vllm"}, {}, r"experts.0.dtype: .*\(awq\).* float32: take float16 or bfloat16"),
        (
            {"max_model_tokens": 128} | VLLM,
            {},
            r"experts.0.max_tokens 512 \+ sampling.max_new_tokens 10 is more than experts.0.max_model_tokens, 128",
        ),
        ({"max_model_tokens": 128, "max_tokens": 119} | VLLM, {}, r"experts.0.max_tokens 119 \+ sampling.max_new_t"),
        (VLLM, {}, r"experts.0.max_tokens 512 \+ .* more than the positions of .*good, 512"),
        ({"max_tokens": 513}, {}, "experts.0.max_tokens 513 is more than the positions of .*good, 512"),
    ],
)
def test_a_model_that_cannot_do_what_is_asked_is_refused(
    models: Path, expert: dict[str, Any], policy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight.check_models(config(models, expert, policy))


@pytest.mark.parametrize(
    "expert",
    [
        {"layer": 0},
        {"layer": 2},
        {"layer": -3},
        {"max_tokens": 512},
        {"max_model_tokens": 128, "max_tokens": 118} | VLLM,
        {"model": "awq", "max_tokens": 64} | VLLM,
        {"model": "compressed-tensors", "max_tokens": 64, "engine": "vllm"},
    ],
)
def test_a_model_that_just_can_is_not(models: Path, expert: dict[str, Any]) -> None:
    preflight.check_models(config(models, expert, {}))


BERT = {"model": "bert", "max_tokens": 64}


@pytest.mark.parametrize(
    ("expert", "policy", "router", "message"),
    [
        ({}, {"model": "bert"}, {}, "policy.model: .* cannot be the policy: it is an encoder"),
        (BERT | {"max_tokens": 65}, {}, {}, "experts.0.max_tokens 65 is more than the positions of .*bert, 64"),
        (BERT, {}, {"kind": "text"}, r"experts.0: .*bert is an encoder \(BertForMaskedLM\).*router.kind: text asks"),
        (BERT, {}, {"text": {"template": "{e} {prompt}"}}, r"experts.0: .* take \{e\} out of router.text.template"),
        (BERT | VLLM, {}, {}, "experts.0.engine: .*bert is an encoder: take engine: transformers"),
        (BERT, {}, {"warm_start": {"steps": 5}}, "router.warm_start learns from the experts' answers, and e cannot"),
    ],
)
def test_an_encoder_is_refused_where_answers_are_asked_for(
    models: Path, expert: dict[str, Any], policy: dict[str, Any], router: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight.check_models(config(models, expert, policy, router=router))


@pytest.mark.parametrize("pool", ["first", "mean", "last_k"])
def test_an_encoder_is_an_expert_like_others(models: Path, pool: str) -> None:
    preflight.check_models(config(models, BERT | {"pool": pool, "layer": -2}, {}))


@pytest.mark.parametrize(
    ("policy", "limit", "whose"),
    [
        (VLLM | {"max_model_tokens": 60}, 60, "policy.max_model_tokens"),
        (VLLM, 512, "positions"),
        ({}, 512, "positions"),
    ],
)
def test_a_policy_without_room_for_its_answers_is_refused(
    models: Path, policy: dict[str, Any], limit: int, whose: str
) -> None:
    """Of the limit, 8 latents and 10 new tokens are not the prompt's; or, in their place, the text's."""
    short = {"router": {"text": {"template": "{prompt}"}}}
    preflight.check_models(config(models, {}, policy, data={"max_prompt_tokens": limit - 18}, **short))
    sum_of = rf"data.max_prompt_tokens {limit - 17} \+ router.latents 8 \+ sampling.max_new_tokens 10"
    with pytest.raises(ConfigError, match=f"{sum_of} is more than .*{whose}.*, {limit}: .* cut short"):
        preflight.check_models(config(models, {}, policy, data={"max_prompt_tokens": limit - 17}, **short))
    with pytest.raises(ConfigError, match=rf"{limit - 18} \+ 1 experts' answers .* \d+ \+ sampling"):
        preflight.check_models(config(models, {}, policy, data={"max_prompt_tokens": limit - 18}))


def test_the_template_s_own_words_and_every_answer_in_it_are_counted(models: Path) -> None:
    text = {"template": "{e} and {e}: {prompt}", "max_new_tokens": 20}
    given = {"router": {"text": text}, "data": {"max_prompt_tokens": 100}}
    tokenizer = load_tokenizer(str(models / "good"))
    words = len(tokenizer(" and : 1")["input_ids"]) - len(tokenizer("1")["input_ids"])
    fits = 100 + (text_tokens := 2 * 20 + words) + 10
    assert words > 2
    preflight.check_models(config(models, {}, VLLM | {"max_model_tokens": fits}, **given))
    with pytest.raises(ConfigError, match=rf"100 \+ 2 experts' answers .* {text_tokens} \+ sampling"):
        preflight.check_models(config(models, {}, VLLM | {"max_model_tokens": fits - 1}, **given))


def test_without_a_limit_the_longest_prompt_must_leave_room(models: Path) -> None:
    short = {"router": {"text": {"template": "{prompt}"}}}
    made = config(models, {}, VLLM)
    tasks = build_tasks(made.data)
    tokenizer = load_tokenizer(str(models / "good"))
    longest = max(len(Chat(tokenizer).tokenize(prompt.messages)) for prompt in tasks["digits"].train)
    enough = config(models, {}, VLLM | {"max_model_tokens": longest + 18}, **short)
    assert preflight.check_prompts(enough, tasks, print) == tasks
    with pytest.raises(ConfigError, match=rf"the longest prompt .*data.max_prompt_tokens\) {longest} \+ router"):
        preflight.check_prompts(config(models, {}, VLLM | {"max_model_tokens": longest + 17}, **short), tasks, print)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "mamba cannot be the policy: it keeps what it has read in cache_params"),
        ("rwkv", "rwkv cannot be the policy: it keeps what it has read in state"),
        (
            "recurrent_gemma",
            "recurrent_gemma cannot be the policy: its recurrent blocks keep their state in themselves",
        ),
        ("jamba", "jamba cannot be the policy: its recurrent layers are not known to go on exactly"),
    ],
)
def test_a_policy_that_would_read_a_prefix_wrongly_is_refused_by_name(
    models: Path, tmp_path: Path, name: str, reason: str
) -> None:
    path = architectures.make(name, tmp_path / name)
    with pytest.raises(ConfigError, match=rf"^policy\.model: model .*: {reason}.*; as an expert it works$"):
        preflight.check_models(config(models, {}, {"model": path}))
    preflight.check_models(config(models, {"model": path, "max_tokens": 64}, {}))


def test_layers_that_read_token_ids_are_no_policy_for_vllm(models: Path, tmp_path: Path) -> None:
    path = architectures.make("gemma3n", tmp_path)
    preflight.check_models(config(models, {}, {"model": path}))
    with pytest.raises(ConfigError, match=r"^policy\.model: .* which vLLM does not take beside a prefix"):
        preflight.check_models(config(models, {}, VLLM | {"model": path}))


@pytest.mark.parametrize(("role", "key"), [("the policy", "policy"), ("an expert", "experts.0")])
def test_what_vllm_computes_wrongly_is_refused_by_name(models: Path, tmp_path: Path, role: str, key: str) -> None:
    path = architectures.make("qwen3_next", tmp_path)

    def check(**engine: Any) -> None:
        expert, policy = ({}, engine) if key == "policy" else (engine | {"max_tokens": 64}, {})
        preflight.check_models(config(models, expert, policy))

    check(model=path)
    check(model=path, engine="vllm", gpus=1)
    reason = rf"model .*: qwen3_next cannot be {role} on vLLM: .* in bfloat16 only; on GPUs it was not tried"
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}\.model: {reason}; take engine: transformers$"):
        check(model=path, engine="vllm")


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.stem for path in RECIPES])
def test_no_shipped_recipe_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    monkeypatch.setattr(preflight, "model_path", lambda reference: str(models / "good"))
    preflight.check_models(load(recipe))


def test_nor_is_the_launcher_s(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manifest = Path("cluster/jobs/launchers/kuberay-rayjob.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(list(yaml.safe_load_all(manifest))[1]["data"]["recipe.yaml"])
    monkeypatch.setattr(preflight, "model_path", lambda reference: str(models / "good"))
    describe = preflight.describe
    monkeypatch.setattr(preflight, "describe", lambda path: describe(path) | {"longest": 32768})
    preflight.check_models(load(tmp_path / "recipe.yaml"))
    with pytest.raises(ConfigError, match=r"is more than policy.max_model_tokens, 1536"):
        preflight.check_models(load(tmp_path / "recipe.yaml", ["policy.max_model_tokens=1536"]))


def test_the_plan_says_how_many_threads_a_worker_gets() -> None:
    rows = preflight.plan_rows(load("configs/quickstart.yaml", ["threads=3", "policy.threads=2"]))
    assert [row.threads for row in rows] == ["3", "3", "2", "1", "3"]
    unsaid = preflight.plan_rows(load("configs/quickstart.yaml", ["threads=0"]))
    assert unsaid[0].threads == "shared"


def test_a_zoo_model_that_no_recipe_has_is_refused_before_its_world_is_built() -> None:
    with pytest.raises(ValueError, match="has no model 'nope': it has policy, chain_sum, leg_counting"):
        preflight.check_names(load("configs/quickstart.yaml", ["experts.0.model=zoo/composed/nope"]))


def test_a_zoo_model_that_was_trained_on_held_out_questions_is_refused() -> None:
    by_question = ["data.split_by=question"]
    with pytest.raises(ConfigError, match=r"experts.0.model: zoo/composed/chain_sum was trained on .* split_by: entry"):
        preflight.check_names(load("configs/quickstart.yaml", by_question))
    others = [f"experts.{index}.model=/models/mine" for index in range(2)]
    with pytest.raises(ConfigError, match=r"policy.model: zoo/composed/policy was trained on"):
        preflight.check_names(load("configs/quickstart.yaml", [*by_question, *others]))
    untrained = ["experts.0.weights=random", "experts.1.model=/models/mine", "policy.model=/models/policy"]
    preflight.check_names(load("configs/quickstart.yaml", [*by_question, *untrained]))


def test_an_expert_s_parts_must_be_tasks_that_its_template_can_ask_and_tell_apart(models: Path) -> None:
    plus, twice = ({"name": name, "plugin": f"tests.zoo.plugin:{name}"} for name in ("Plus", "Twice"))
    both = {"name": "both", "compose": ["Plus", "Twice"], "size": 200}
    other = both | {"name": "other", "compose": ["Twice", "Plus"]}

    def made(expert: dict[str, Any], *tasks: dict[str, Any]) -> RunConfig:
        return config(models, expert, {}, data={"tasks": [plus, twice, *tasks]})

    with pytest.raises(ConfigError, match=r"experts.0.parts: 'plus' is none of data.tasks: Plus, Twice"):
        made({"parts": ["plus"], "template": "{question}"}, both)
    for wrong in ({}, {"template": "{prompt}"}):
        with pytest.raises(ConfigError, match=r"experts.0.template must say where: give it one with {question}"):
            made({"parts": ["Plus"]} | wrong, both)
    asked = {"parts": ["Plus"], "template": "{question}"}
    with pytest.raises(ConfigError, match=r"the same wording and other parts.*: give one of them a template"):
        made(asked, both, other)
    run = made(asked, both, other | {"template": "{part1} | {part2}"})
    style, tasks = run.prompt_style, build_tasks(run.data)
    for prompt in (prompt for task in tasks.values() for prompt in task.train):
        own = [part["question"] for part in questions_of(prompt) if part["task"] == "Plus"]
        content = prompt.messages[-1]["content"]
        assert style.question(content, ["Plus"]) == (own or [prompt.payload["question"]])[0]
        assert style.question(content) == prompt.payload["question"]
    preflight.check_parts(run, tasks)
    unclear = made(asked, both, other | {"template": "{part1} and {part2}"})
    with pytest.raises(ConfigError, match="in a prompt of task 'other' nobody can tell where the question 'What is"):
        preflight.check_parts(unclear, build_tasks(unclear.data))
    composed = "Problem 1: 1 + 1\nProblem 2: twice 2\nWhat is the sum of the two answers?"
    found = {content: style.question(content, ["Plus"]) for content in (composed + "\nAnswer:", "twice 3 | 2 + 2")}
    assert list(found.values()) == ["1 + 1", "2 + 2"]
    assert [style.question(content) for content in found] == [composed, "twice 3 | 2 + 2"]


def test_a_question_that_is_served_comes_under_the_template_of_all_tasks(models: Path) -> None:
    task = {"name": "digits", "plugin": "tests.plugins:Digits"}
    words = {"name": "words", "compose": ["digits"], "operation": "words", "template": "2 + 1 = three\n{part1} ="}
    run = config(models, {}, {}, data={"tasks": [words, task], "template": "Q: {question}"})
    ready = Ready(trained=None, config=run, shape=None)  # type: ignore[arg-type] - its words depend on neither
    assert ready.messages("2 + 2") == ({"role": "user", "content": "Q: 2 + 2"},)


def test_a_package_that_a_quantised_model_needs_is_named(models: Path) -> None:
    with pytest.raises(ModelError, match=r"awq' cannot be loaded: .*AWQ.* requires"):
        load_frozen(str(models / "awq"))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"max_model_tokens": 128}, "policy: max_model_tokens is a setting of vLLM: take engine: vllm"),
        ({"kv_cache_gb": 1.0}, "policy: kv_cache_gb is a setting"),
        ({"gpu_memory_utilization": 0.5, "gpus": 1}, "policy: gpu_memory_utilization is a setting"),
        ({"eager": False}, "policy: eager is a setting"),
        (VLLM | {"gpus": 0.5, "kv_cache_gb": 1.0}, "kv_cache_gb 1 is for machines without GPUs: with gpus 0.5"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(models: Path, policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(models, {}, policy)


@pytest.mark.parametrize("policy", [{}, {"gpus": 1}, VLLM | {"gpus": 1}, VLLM | {"kv_cache_gb": 1.0}])
def test_a_run_s_own_config_names_every_setting_and_loads_again(models: Path, policy: dict[str, Any]) -> None:
    made = config(models, {}, policy)
    assert parse(yaml.safe_load(made.as_yaml()), "again") == made


@pytest.mark.parametrize("kind", ["static", "none"])
def test_a_control_by_states_that_nothing_reads_is_refused(models: Path, kind: str) -> None:
    states = {"router": {"kind": kind, "states": "shuffled"}}
    with pytest.raises(ConfigError, match=f"router.states: shuffled changes nothing for kind: {kind}"):
        preflight.check_names(config(models, {}, {}, **states))
    preflight.check_names(config(models, {}, {}, router={"kind": "text", "states": "shuffled"}))


def test_variables_that_a_chat_template_does_not_read_are_refused_with_their_key(models: Path, tmp_path: Path) -> None:
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    for expert, policy, key in [(quiet, {}, r"experts\.0"), ({}, quiet, "policy")]:
        with pytest.raises(
            ConfigError, match=rf"^{key}\.chat_template_kwargs: it has no chat template that could read"
        ):
            preflight.check_models(config(models, expert, policy))
    thinks = shutil.copytree(models / "good", tmp_path / "thinks")
    (thinks / "chat_template.jinja").write_text("{{ messages[0].content }}{% if enable_thinking %} think{% endif %}")
    preflight.check_models(config(models, {"model": thinks} | quiet, {"model": thinks} | quiet))
    wrong = {"model": thinks, "chat_template_kwargs": {"think": False}}
    with pytest.raises(ConfigError, match=r"^policy\.chat_template_kwargs: its chat template never reads 'think'"):
        preflight.check_models(config(models, {}, wrong))


def test_an_expert_is_tried_with_its_own_wording_and_the_policy_counted_with_its_variables(
    models: Path, tmp_path: Path
) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + (
        "{{ messages[0].content }}{% if enable_thinking %}, and think about it a little{% endif %}"
    )
    strict = shutil.copytree(models / "good", tmp_path / "strict")
    (strict / "chat_template.jinja").write_text(template)
    (tmp_path / "system.txt").write_text("Be brief.")
    system = {"data": {"system": str(tmp_path / "system.txt")}}
    refused = config(models, {"model": strict}, {}, **system)
    tasks = build_tasks(refused.data)
    digits = tasks["digits"].train[0]
    said = [({"role": "system", "content": "Be brief."}, *digits.messages)]
    asked = {"digits": replace(tasks["digits"], train=(replace(digits, messages=said[0]),))}
    with pytest.raises(ConfigError, match=r'^experts\.0\.model: .*no system role; experts\.0\.system: "" leaves out'):
        preflight.check_prompts(refused, asked, print)
    preflight.check_prompts(config(models, {"model": strict, "system": ""}, {}, **system), asked, print)
    thinking = {"model": strict, "chat_template_kwargs": {"enable_thinking": True}}
    limit = {"data": {"max_prompt_tokens": 30, "long_prompts": "refuse"}}
    preflight.check_prompts(config(models, {}, {"model": strict}, **limit), tasks, print)
    with pytest.raises(ValueError, match=r"200 prompts are longer than .*one has 39"):
        preflight.check_prompts(config(models, {}, thinking, **limit), tasks, print)
