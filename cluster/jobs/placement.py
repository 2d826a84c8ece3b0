"""Which models fit on which GPUs: a plan with its numbers, before anything is allocated.

Estimates of what must fit, not of what is taken: vLLM fills its whole share with key-value cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cluster.config import ConfigError, RunConfig
from experts.config import EngineConfig
from learner.token_logprobs import CHUNK

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCHED_TOKENS = 8192  # vLLM's own default on GPUs
PROMPT_TOKENS = 512  # where data.max_prompt_tokens says nothing
# Kept of a token and layer for the backward pass through frozen weights, in vectors of the width and of the
# feed-forward blocks (measured: docs/memory.md).
KEPT_WIDTHS, KEPT_FEEDFORWARDS = 10, 3
CONTEXT = 0.6 * GIB  # CUDA's own, a process


@dataclass(frozen=True)
class Node:
    """gpus: how many; memory: bytes of each, None where nobody knows."""

    name: str
    gpus: int
    memory: int | None = None


@dataclass(frozen=True)
class Need:
    """What one kind of worker takes on each GPU it is on, in bytes.

    gpus: of one worker; share: of a GPU's memory that it may take.  cache: least key-value cache.
    """

    key: str
    worker: str
    workers: int
    gpus: float
    share: float
    weights: float
    cache: float
    activations: float

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.weights + self.cache + self.activations


def needs(config: RunConfig, models: Mapping[str, Mapping[str, Any]]) -> list[Need]:
    """What the workers that ask for GPUs need there.

    Args:
        models: by configuration key, what `experts.loading.describe` says of each.
    """
    found = []
    for index, expert in enumerate(config.experts):
        key = f"experts.{index}"
        if expert.gpus:
            model = models[f"{key}.model"]
            found.append(_frozen_need(key, f"Expert({expert.name})", expert.replicas, expert, model, expert.max_tokens))
    policy, model = config.policy, models["policy.model"]
    prompt = config.data.max_prompt_tokens or PROMPT_TOKENS
    length = prompt + config.router.latents + config.sampling.max_new_tokens
    if policy.gpus:
        rows = 1 if policy.engine == "vllm" else config.prompts_per_call * config.sampling.samples
        longest = (policy.max_model_tokens or length) if policy.engine == "vllm" else length
        found.append(_frozen_need("policy", "Rollout", policy.workers, policy, model, longest * rows))
    learner = config.learner
    if learner.gpus:
        size = BYTES[policy.dtype]
        tokens = max(learner.microbatch_tokens, length)
        activations = tokens * _kept_numbers(model, learner.checkpoint_activations) * size
        activations += 3 * 4 * min(max(CHUNK, model["vocabulary"]), tokens * model["vocabulary"])
        weights = _weights(model, size)
        found.append(
            Need("learner", "Learner", learner.ranks, learner.gpus, learner.gpus, weights, 0.0, CONTEXT + activations)
        )
    return found


def _kept_numbers(model: Mapping[str, Any], checkpointed: bool) -> float:
    """Of a token, for the backward pass; with checkpointing each layer's input and cache, and one layer."""
    layer = KEPT_WIDTHS * model["hidden_size"] + KEPT_FEEDFORWARDS * model["feedforward"]
    if not checkpointed:
        return float(layer * model["layers"])
    return float(layer + model["layers"] * (model["hidden_size"] + 2 * model["kv_heads"] * model["head_size"]))


def _frozen_need(
    key: str, worker: str, workers: int, config: EngineConfig, model: Mapping[str, Any], cached_tokens: int
) -> Need:
    size, split = BYTES[config.dtype], config.tensor_parallel
    vllm = config.engine == "vllm"
    cache = 2 * model["layers"] * model["kv_heads"] * model["head_size"] * size * cached_tokens
    width = 4 * model["hidden_size"] + 2 * model["feedforward"]
    activations = BATCHED_TOKENS * width * size + 256 * model["vocabulary"] * 4
    share = config.memory_share if vllm else min(config.gpus, 1.0)
    return Need(
        key, worker, workers, config.gpus, share, _weights(model, size) / split, cache / split, CONTEXT + activations
    )


def _weights(model: Mapping[str, Any], size: int) -> float:
    if model["quantized"] and model["stored_bytes"]:
        return float(model["stored_bytes"])
    head = model["vocabulary"] * model["hidden_size"]
    attention = model["hidden_size"] * model["head_size"] * (2 * model["heads"] + 2 * model["kv_heads"])
    layer = attention + 3 * model["hidden_size"] * model["feedforward"]
    return float(size * (model["layers"] * layer + head * (1 if model["tied"] else 2)))


def check(found: Sequence[Need], nodes: Sequence[Node]) -> None:
    """Refuses a plan that cannot fit.

    Raises:
        ConfigError: naming the key, with the numbers.
    """
    asked, there = sum(need.gpus * need.workers for need in found), sum(node.gpus for node in nodes)
    if asked > there:
        parts = ", ".join(f"{need.key} {need.workers} x {need.gpus:g}" for need in found)
        raise ConfigError(f"the workers ask for {asked:g} GPUs ({parts}), and the cluster has {there}")
    smallest = min((node.memory for node in nodes if node.gpus and node.memory), default=None)
    for need in found:
        if smallest is not None and need.bytes > need.share * smallest:
            raise ConfigError(
                f"{need.key}: {need.worker} needs {_gib(need.bytes)} GiB on a GPU ({_gib(need.weights)} weights, "
                f"{_gib(need.cache)} cache, {_gib(need.activations)} activations), and its share of {need.share:g} "
                f"of {_gib(smallest)} GiB is {_gib(need.share * smallest)}: raise {need.key}.gpus or split the model"
            )
    _pack(found, nodes)


def _pack(found: Sequence[Need], nodes: Sequence[Node]) -> None:
    """The workers with most first, each onto the fullest GPU that has room; whole GPUs of one worker on one node."""
    free = [[1.0] * node.gpus for node in nodes]
    for need in sorted(found, key=lambda need: -need.gpus):
        for _ in range(need.workers):
            if not _place(need.gpus, free):
                raise ConfigError(
                    f"{need.key}: there is no room for {need.worker} with {need.gpus:g} GPUs beside the other workers: "
                    f"{', '.join(f'{node.name} has {node.gpus}' for node in nodes)}"
                )


def _place(gpus: float, free: list[list[float]]) -> bool:
    if gpus >= 1:
        for node in free:
            whole = [index for index, left in enumerate(node) if left == 1.0]
            if len(whole) >= gpus:
                for index in whole[: int(gpus)]:
                    node[index] = 0.0
                return True
        return False
    fitting = [(left, node, i) for node in free for i, left in enumerate(node) if left >= gpus - 1e-9]
    if not fitting:
        return False
    _, node, index = min(fitting, key=lambda option: option[0])
    node[index] -= gpus
    return True


def table(found: Sequence[Need], nodes: Sequence[Node]) -> Table:
    """The plan for people."""
    smallest = min((node.memory for node in nodes if node.gpus and node.memory), default=None)
    shown = Table(title="memory plan, GiB on each GPU")
    shown.add_column("worker")
    for name in ("workers", "GPUs each", "weights", "cache, at least", "activations", "needs", "may take"):
        shown.add_column(name, justify="right")
    for need in found:
        numbers = (need.weights, need.cache, need.activations, need.bytes)
        limit = "unknown" if smallest is None else _gib(need.share * smallest)
        shown.add_row(need.worker, str(need.workers), f"{need.gpus:g}", *map(_gib, numbers), limit)
    return shown


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}"
