"""Step records and evaluations with known numbers."""

from __future__ import annotations

from cluster.watch.results import Result

TASKS = ("composed", "chain_sum")
EXPERTS = ("chain_sum", "leg_counting")


def record(step: int, **changed: float) -> dict[str, object]:
    """One full step record; `changed` names metrics with `__` for the slash."""
    metrics: dict[str, object] = {
        "step": step,
        "ordinals": [2 * step, 2 * step + 1],
        "reward/mean": 0.625,
        "reward/composed": 0.375,
        "reward/chain_sum": 0.875,
        "reward/std": 0.312,
        "groups/no_signal": 0.17,
        "rewards/masked_fraction": 0.03,
        "policy/kl": 0.913,
        "policy/entropy": 1.234,
        "policy/clip_fraction": 0.06,
        "policy/truncated_fraction": 0.02,
        "policy/logprob_mismatch": 1.2e-6,
        "router/attention_entropy": 0.518,
        "router/grad_norm": 44.4,
        "router/prefix_rms_ratio": 0.021,
        "router/version": float(step),
        "staleness/mean": 0.4,
        "staleness/max": 1.0,
        "rollout/tokens_per_second": 3416.0,
        "cache/hit_rate": 0.98,
        "time/step_s": 0.2,
        "time/encode_s": 0.01,
        "time/rollout_s": 0.09,
        "time/reward_s": 0.002,
        "time/learner_s": 0.05,
        "idle/encode": 0.95,
        "idle/rollout": 0.55,
        "idle/reward": 0.99,
        "idle/learner": 0.75,
        "attention/composed/chain_sum": 0.47,
        "attention/composed/leg_counting": 0.53,
        "attention/chain_sum/chain_sum": 0.81,
        "attention/chain_sum/leg_counting": 0.19,
    }
    return metrics | {name.replace("__", "/"): value for name, value in changed.items()}


def result(composed: float, chain_sum: float, prompts: int = 400) -> Result:
    """A system's accuracies on two tasks."""
    return {
        "tasks": {"composed": composed, "chain_sum": chain_sum},
        "mean": (composed + chain_sum) / 2,
        "prompts": {"composed": prompts, "chain_sum": prompts},
    }


def evaluation(router: Result) -> dict[str, Result]:
    """The router among the usual systems: routing reaches .16 on composed and .83 on chain_sum."""
    return {
        "router": router,
        "shuffled_within_task": result(0.03, 0.05),
        "shuffled": result(0.02, 0.04),
        "frozen_policy": result(0.07, 0.10),
        "experts/chain_sum": result(0.105, 0.83),
        "experts/leg_counting": result(0.0625, 0.02),
        "route_and_answer": result(0.16, 0.83),
        "oracle_route": result(0.25, 0.84),
    }


def with_outcomes(system: Result, prompts: int = 400) -> Result:
    """The same system with outcomes: its first prompts of every task are right."""
    outcomes = {
        task: [int(index < round(share * prompts)) for index in range(prompts)]
        for task, share in system["tasks"].items()
    }
    return {**system, "outcomes": outcomes}
