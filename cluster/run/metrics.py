"""One step's metrics, from the stages' reports and the learner's sums (names: docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from cluster.run.scoring import GroupReport, WaveReport
from learner.advantages import has_signal
from learner.gradient import Sums
from rollout.types import RewardStatus


@dataclass(frozen=True)
class StepTimes:
    """Wall-clock seconds of a step, as the driver saw them."""

    step_s: float
    learner_s: float


@dataclass(frozen=True)
class PipelineState:
    """What is under way beside a step.

    filtered: groups without signal that ended since the last update.  running, waiting: prompts in some
    stage, and finished groups that wait.  restarts: of workers, so far.
    levels: of the tasks' curricula, for the prompts that are issued next.
    workers: of the stages that share their calls among several.
    """

    filtered: int = 0
    running: int = 0
    waiting: int = 0
    restarts: int = 0
    levels: Mapping[str, int] = field(default_factory=dict)
    workers: Mapping[str, int] = field(default_factory=dict)


# Metrics that depend on the machine, not on the computation: two equal runs may differ in these.
MACHINE_PREFIXES = (
    "experts/",
    "operations/experts",
    "operations/rollout",
    "time/",
    "idle/",
    "cache/",
    "rollout/tokens_per_second",
    "pipeline/",
)


def step_metrics(
    reports: Sequence[WaveReport],
    groups: Sequence[GroupReport],
    experts: Sequence[str],
    version: int,
    learner: tuple[Sums, float],
    times: StepTimes,
    pipeline: PipelineState,
) -> dict[str, float]:
    """Metrics of the update that trained `groups` and made router `version` + 1.

    reports: of the waves that finished since the last update, for rates and times.
    """
    sums, grad_norm = learner
    rewards = [reward for group in groups for reward in group.ok_rewards]
    completions = sum(len(group.statuses) for group in groups)
    staleness = [version - group.version for group in groups]
    hits, misses = sum(r.hits for r in reports), sum(r.misses for r in reports)
    tokens = sum(report.tokens for report in reports)
    untaught = sum(not has_signal(group.rewards, group.statuses) for group in groups)
    stages = {
        "encode": sum(report.encode_s for report in reports),
        "rollout": sum(report.rollout_s for report in reports),
        "reward": sum(report.reward_s for report in reports),
        "learner": times.learner_s,
    }
    return {
        "reward/mean": _mean(rewards),
        "reward/std": pstdev(rewards) if rewards else 0.0,
        **{f"reward/{task}": _mean(r for g in mine for r in g.ok_rewards) for task, mine in by_task(groups).items()},
        "groups/no_signal": (untaught + pipeline.filtered) / (len(groups) + pipeline.filtered),
        **verdict_metrics(groups),
        "policy/truncated_fraction": sum(group.truncated for group in groups) / completions,
        **learner_metrics(sums),
        "loss": sums.values.get("loss", 0.0),
        "router/attention_entropy": _mean(group.entropy for group in groups),
        "router/grad_norm": grad_norm,
        "router/prefix_rms_ratio": _mean(group.prefix_rms_ratio for group in groups),
        "router/version": float(version),
        "staleness/mean": _mean(staleness),
        "staleness/max": float(max(staleness)),
        "groups/filtered": float(pipeline.filtered),
        **{f"curriculum/{task}": float(level) for task, level in pipeline.levels.items()},
        "pipeline/running": float(pipeline.running),
        "pipeline/waiting": float(pipeline.waiting),
        "pipeline/restarts": float(pipeline.restarts),
        **operation_metrics(reports, sums),
        "rollout/tokens_per_second": tokens / times.step_s,
        "cache/hit_rate": hits / max(hits + misses, 1),
        "time/step_s": times.step_s,
        **{f"time/{stage}_s": seconds for stage, seconds in stages.items()},
        **{
            f"idle/{stage}": max(0.0, 1 - seconds / (times.step_s * pipeline.workers.get(stage, 1)))
            for stage, seconds in stages.items()
        },
        **attention_metrics(groups, experts),
        **cut_metrics(reports, experts),
    }


def operation_metrics(reports: Sequence[WaveReport], sums: Sums) -> dict[str, float]:
    """Floating-point operations by stage."""
    return {
        "operations/experts": sum(r.operations.experts for r in reports),
        "operations/experts_cold": sum(r.operations.cold for r in reports),
        "operations/rollout": sum(r.operations.policy for r in reports),
        "operations/learner": sums.values.get("operations", 0.0),
    }


def learner_metrics(sums: Sums) -> dict[str, float]:
    """Means over what the learner computed; none where it computed nothing, or measured no KL."""
    found = {}
    if sums.values.get("choices"):
        found["router/choice_entropy"] = sums.mean("choice_entropy", per="choices")
        found["router/closed_fraction"] = sums.mean("closed", per="choices")
    if sums.values.get("kl_tokens"):
        found["policy/kl"] = sums.mean("kl", per="kl_tokens")
    if sums.values.get("tokens"):
        found |= {
            "policy/entropy": sums.mean("entropy"),
            "policy/ratio": sums.mean("ratio"),
            "policy/clip_fraction": sums.mean("clipped"),
            "policy/clipped_completions_fraction": sums.mean("clipped_completions", per="completions"),
            "policy/corrected_fraction": sums.mean("corrected"),
            "policy/kl_clamped_fraction": sums.mean("kl_clamped"),
            "policy/logprob_mismatch": sums.mean("mismatch"),
            "policy/logprob_mismatch_max": sums.mismatch_max,
        }
    return found


def verdict_metrics(groups: Sequence[GroupReport]) -> dict[str, float]:
    """How scoring ended, in all and by task."""
    found = {}
    for name, share in (("masked", _masked), ("unreadable", _unreadable)):
        found[f"rewards/{name}_fraction"] = share(groups)
        found |= {f"rewards/{name}_fraction/{task}": share(mine) for task, mine in by_task(groups).items()}
    return found | {f"verdicts/{task}/{status}": float(n) for (task, status), n in verdicts(groups).items()}


def _masked(groups: Sequence[GroupReport]) -> float:
    return 1 - sum(len(group.ok_rewards) for group in groups) / sum(len(group.statuses) for group in groups)


def _unreadable(groups: Sequence[GroupReport]) -> float:
    return sum(group.unreadable for group in groups) / sum(len(group.statuses) for group in groups)


def attention_metrics(groups: Sequence[GroupReport], experts: Sequence[str]) -> dict[str, float]:
    """`attention/<task>/<expert>`: mean share of a task's prompts' attention."""
    return {
        f"attention/{task}/{expert}": _mean(group.attention[index] for group in mine)
        for task, mine in by_task(groups).items()
        for index, expert in enumerate(experts)
    }


def cut_metrics(reports: Sequence[WaveReport], experts: Sequence[str]) -> dict[str, float]:
    """`experts/<expert>/truncated`: share of prompts whose middle an expert did not see; none where none was asked."""
    asked = [report for report in reports if report.cut]
    prompts = sum(len(report.groups) for report in asked)
    return {
        f"experts/{expert}/truncated": sum(report.cut[index] for report in asked) / prompts
        for index, expert in enumerate(experts)
        if prompts
    }


def verdicts(groups: Sequence[GroupReport]) -> dict[tuple[str, str], int]:
    """How many completions of each task the verifiers judged (ok), gave up on (timeout) or failed at (error)."""
    return {
        (task, str(status.value)): sum(group.statuses.count(status) for group in mine)
        for task, mine in by_task(groups).items()
        for status in RewardStatus
    }


def by_task(groups: Sequence[GroupReport]) -> dict[str, list[GroupReport]]:
    """Groups by task name, tasks in name order."""
    return {task: [g for g in groups if g.task == task] for task in sorted({g.task for g in groups})}


def _mean(values: Iterable[float]) -> float:
    collected = [float(value) for value in values]
    return fmean(collected) if collected else 0.0
