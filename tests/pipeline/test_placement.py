"""The memory plan: what it adds up, and what it refuses, with the numbers in the message."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.config import ConfigError, RunConfig, parse
from cluster.jobs.placement import GIB, Node, check, needs, table

# Qwen2.5-3B's shape.
MODEL: dict[str, Any] = {
    "hidden_size": 2048, "layers": 36, "vocabulary": 151_936, "heads": 16, "kv_heads": 2, "head_size": 128,
    "feedforward": 11_008, "longest": 32_768, "stored_bytes": 0, "quantized": False, "tied": True,
}  # fmt: skip


def config(experts: list[dict[str, Any]], policy: dict[str, Any], **learner: Any) -> RunConfig:
    """A run of models that are not here."""
    return parse(
        {
            "run": "plan",
            "steps": 1,
            "data": {"tasks": [{"name": "t", "dataset": "chain_sum"}]},
            "experts": [{"name": f"e{i}", "model": "m", "dtype": "bfloat16"} | e for i, e in enumerate(experts)],
            "policy": {"model": "m", "engine": "vllm", "dtype": "bfloat16"} | policy,
            "learner": learner,
        },
        "test",
    )


def plan(run: RunConfig, nodes: list[Node], **model: Any) -> None:
    """Makes and checks a plan in which all models have one shape."""
    check(needs(run, dict.fromkeys(run.models(), MODEL | model)), nodes)


EIGHT = [Node("one", 8, 80 * GIB)]


def test_weights_and_cache_of_a_known_model() -> None:
    (need,) = needs(
        config([{}], {"gpus": 1, "max_model_tokens": 1000}), {"experts.0.model": MODEL, "policy.model": MODEL}
    )
    assert need.weights / 2 == pytest.approx(3.09e9, rel=0.02)  # Qwen2.5-3B: 3.09 billion parameters
    assert need.cache == 1000 * 36 * 2 * 2 * 128 * 2
    assert need.share == 0.9


def test_the_learner_needs_activations_and_no_more_than_a_chunk_of_logits() -> None:
    def activations(vocabulary: int = 151_936, **learner: Any) -> float:
        run = config([{}], {}, gpus=1, microbatch_tokens=32_768, **learner)
        (need,) = needs(run, dict.fromkeys(run.models(), MODEL | {"vocabulary": vocabulary}))
        return need.bytes - need.weights

    plain, saving = activations(), activations(checkpoint_activations=True)
    assert plain == pytest.approx(32_768 * 36 * 107_000, rel=0.03), "docs/memory.md, measured"
    assert saving < plain / 10
    assert activations(vocabulary=2 * 151_936) == plain
    assert activations(vocabulary=10) < plain


def test_the_plan_of_the_issue_fits_and_is_shown() -> None:
    """Three experts that share a GPU, a split one with two replicas, a policy and a learner."""
    vllm = {"engine": "vllm"}
    run = config(
        [
            {"gpus": 0.25} | vllm,
            {"gpus": 0.25} | vllm,
            {"gpus": 0.5} | vllm,
            {"tensor_parallel": 2, "replicas": 2} | vllm,
        ],
        {"gpus": 1},
        gpus=1,
        microbatch_tokens=4096,
    )
    found = needs(run, dict.fromkeys(run.models(), MODEL))
    check(found, EIGHT)
    check(found, [Node("a", 3, 80 * GIB), Node("b", 4, 80 * GIB)])
    console = Console(file=io.StringIO(), width=160)
    console.print(table(found, EIGHT))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Expert(e3)" in shown and "Learner" in shown and "72.0" in shown


@pytest.mark.parametrize(
    ("experts", "policy", "nodes", "message"),
    [
        ([{"gpus": 1}], {"gpus": 1}, [Node("one", 1, 80 * GIB)], r"ask for 2 GPUs \(experts.0 1 x 1, policy 1 x 1\)"),
        ([{}], {"gpus": 0.05}, EIGHT, r"policy: Rollout needs .* its share of 0.045 of 80.0 GiB is 3.6"),
        ([{"gpus": 0.7}] * 3, {"gpus": 0.7}, [Node("one", 3, 80 * GIB)], "no room for Rollout with 0.7 GPUs"),
        (
            [{"engine": "vllm", "tensor_parallel": 2}],
            {"gpus": 1},
            [Node("a", 1, 80 * GIB), Node("b", 1, 80 * GIB), Node("c", 1, 80 * GIB)],
            r"experts.0: there is no room for Expert\(e0\) with 2 GPUs .* a has 1, b has 1",
        ),
    ],
)
def test_a_plan_that_cannot_fit_is_refused(
    experts: list[dict[str, Any]], policy: dict[str, Any], nodes: list[Node], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config(experts, policy), nodes)


def test_gpus_that_say_nothing_of_their_memory_are_only_counted() -> None:
    plan(config([{}], {"gpus": 0.05}), [Node("one", 1)])


def test_a_quantised_model_weighs_what_its_files_do() -> None:
    with pytest.raises(ConfigError, match=r"2\.0 weights"):
        plan(config([{}], {"gpus": 0.01}), EIGHT, quantized=True, stored_bytes=2 * GIB)


@pytest.mark.parametrize(
    ("experts", "policy", "message"),
    [
        ([{"tensor_parallel": 2}], {}, "experts.0: tensor_parallel splits a model over GPUs: engine: vllm can"),
        ([{"engine": "vllm", "layer": 3}], {}, r"'e0': engine: vllm gives the last layer only; .* layer 3"),
        ([{"gpus": 1.5}], {}, "a worker takes a fraction of one GPU, or whole ones"),
        ([{"engine": "vllm", "tensor_parallel": 2, "gpus": 1}], {}, "tensor_parallel 2 needs as many gpus, not 1"),
        ([{}], {"gpus": 2}, "set tensor_parallel to 2, or gpus to 1"),
        ([{}], {"gpus": 0.5, "gpu_memory_utilization": 0.8}, "models that share a GPU would not fit"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_when_the_configuration_loads(
    experts: list[dict[str, Any]], policy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(experts, policy)
