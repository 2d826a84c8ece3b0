"""A configuration's dotted keys, and which of them a resumed run may change."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import RunConfig

# What a resumed run may change: where and how fast it runs, never what it computes.
RESUMABLE = (
    "steps",
    "root",
    "execution",
    "threads",
    "ray",
    "tracking",
    "cache",
    "checkpoint",
    "evaluation.every",
    "evaluation.validation_prompts",
    "evaluation.stand_ins",
    "evaluation.batch",
    "evaluation.cache",
    "pipeline",
    "rewards.workers",
    "rewards.processes",
    "rewards.timeout_s",
    "rewards.memory_mb",
    "rewards.masked_limit",
    "rewards.unreadable_warning",
    "rewards.unreadable_limit",
    "rewards.jail",
    "rewards.jail_exempt",
    "rewards.isolate",
    "rewards.reuse",
    "learner.ranks",
    "learner.zero_stage",
    "learner.microbatch_tokens",
    "learner.cpus",
    "learner.gpus",
    "learner.threads",
    "policy.workers",
    "policy.cpus",
    "policy.gpus",
    "policy.threads",
    "policy.kv_cache_gb",
    "policy.gpu_memory_utilization",
    "policy.tensor_parallel",
    "policy.max_model_tokens",
    "policy.eager",
    "policy.self_check",
    "experts.N.replicas",
    "experts.N.cpus",
    "experts.N.gpus",
    "experts.N.threads",
    "experts.N.kv_cache_gb",
    "experts.N.gpu_memory_utilization",
    "experts.N.tensor_parallel",
    "experts.N.max_model_tokens",
    "experts.N.eager",
    "experts.N.self_check",
)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data as one level of dotted keys; list items by index."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {prefix: value}
    return {k: v for key, item in items for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def matches(key: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or below one; `N` stands for any index."""
    general = re.sub(r"\.\d+\.", ".N.", key)
    return any(general == pattern or general.startswith(pattern + ".") for pattern in patterns)


def changed_keys(saved: RunConfig, now: RunConfig) -> list[str]:
    """Keys that differ and that a resumed run may not change."""
    free = list(RESUMABLE)
    if all(config.algorithm.choice_after == config.choice_after_by_itself for config in (saved, now)):
        free.append("algorithm.choice_after")  # it follows from the steps, which may change
    if now.data.date is None:
        free.append("data.date")  # the run keeps its own
    before, after = flat(saved.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [key for key in differing if not matches(key, free)]
