"""The reward stage as a worker: scores rollouts and tells the driver, in a few bytes, what came of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rewards.config import RewardsConfig
from rewards.verify import Verifier
from rewards.worker import RewardWorker
from rollout.operations import NO_OPERATIONS, Operations
from rollout.types import GroupFacts, Prompt, RewardStatus, Rollout, Score


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What the driver needs of a group; the group itself goes straight to the learner.

    rewards, statuses: one a completion; right: how right its answer is, whatever else the reward adds up from;
    reason: why the first without a verdict has none.
    unreadable: completions that are wrong because their verifier could not read them; unreadable_reason: the first's.
    attention: (experts,) mean over latents; entropy: of the attention over experts, in nats, mean over
    latents.  bytes: of the group's arrays.
    """

    ordinal: int
    task: str
    version: int
    rewards: tuple[float, ...]
    statuses: tuple[RewardStatus, ...]
    truncated: int
    prefix_rms_ratio: float
    attention: tuple[float, ...]
    entropy: float
    bytes: int
    right: tuple[float, ...]
    reason: str = ""
    unreadable: int = 0
    unreadable_reason: str = ""

    @property
    def ok_rewards(self) -> list[float]:
        """Rewards of the completions that were scored."""
        return [r for r, s in zip(self.rewards, self.statuses, strict=True) if s is RewardStatus.OK]

    @property
    def right_share(self) -> float | None:
        """Mean over the scored completions of how right their answers are; None when none was scored."""
        right = [r for r, s in zip(self.right, self.statuses, strict=True) if s is RewardStatus.OK]
        return fmean(right) if right else None


@dataclass(frozen=True, slots=True)
class WaveReport:
    """One wave of prompts through all stages but the learner; times are the workers' own, in seconds.

    cut: see `Rollout`.
    """

    groups: tuple[GroupReport, ...]
    tokens: int
    hits: int
    misses: int
    encode_s: float
    rollout_s: float
    reward_s: float
    operations: Operations = NO_OPERATIONS
    cut: tuple[int, ...] = ()


class ScoringWorker:
    """A reward worker over rollouts."""

    def __init__(self, verifiers: Mapping[str, Verifier], config: RewardsConfig, index: int = 0) -> None:
        self.index = index  # first: an error of what follows is reported with this worker's name
        self.worker = RewardWorker(verifiers, config, index)

    def __repr__(self) -> str:
        return f"Reward({self.index})"

    def ready(self) -> bool:
        """Answers once the worker is built."""
        return True

    def score(self, rollout: Rollout) -> tuple[Rollout, WaveReport]:
        """The rollout with its groups scored, and a report on it."""
        start = time.perf_counter()
        return self._finished(rollout, self.worker.score_answers(rollout.answers()), start)

    def _finished(
        self, rollout: Rollout, scores: Sequence[Sequence[Score]], start: float
    ) -> tuple[Rollout, WaveReport]:
        return rollout.scored(scores), wave_report(rollout, scores, time.perf_counter() - start)

    def score_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score]:
        """Scores of answers that did not come from the policy (experts' own, in evaluation)."""
        return self.worker.score_texts(list(zip(prompts, texts, strict=True)))

    def close(self) -> None:
        """Ends the scoring process."""
        self.worker.close()


class AsyncScoringWorker(ScoringWorker):
    """The reward stage as an asynchronous actor: calls wait for the scoring process without blocking the actor."""

    def __init__(self, verifiers: Mapping[str, Verifier], config: RewardsConfig, index: int = 0) -> None:
        super().__init__(verifiers, config, index)

    async def score(self, rollout: Rollout) -> tuple[Rollout, WaveReport]:  # type: ignore[override]
        """See `ScoringWorker.score`."""
        start = time.perf_counter()
        scores = await self.worker.score_answers_async(rollout.answers())
        return self._finished(rollout, scores, start)

    async def score_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[Score]:  # type: ignore[override]
        """See `ScoringWorker.score_texts`."""
        return super().score_texts(prompts, texts)


def wave_report(rollout: Rollout, scores: Sequence[Sequence[Score]], reward_s: float) -> WaveReport:
    """The driver's view of scored groups."""
    return WaveReport(
        groups=tuple(_group_report(facts, mine) for facts, mine in zip(rollout.facts(), scores, strict=True)),
        tokens=rollout.tokens,
        hits=rollout.hits,
        misses=rollout.misses,
        encode_s=rollout.encode_s,
        rollout_s=rollout.seconds,
        reward_s=reward_s,
        operations=rollout.operations,
        cut=rollout.cut,
    )


def _group_report(facts: GroupFacts, scores: Sequence[Score]) -> GroupReport:
    attention = facts.attention
    entropy = -(attention * np.log(np.maximum(attention, 1e-12))).sum(axis=-1)
    return GroupReport(
        ordinal=facts.ordinal,
        task=facts.task,
        version=facts.version,
        rewards=tuple([score.reward for score in scores]),
        right=tuple([score.right for score in scores]),
        statuses=tuple([score.status for score in scores]),
        truncated=facts.truncated,
        prefix_rms_ratio=facts.prefix_rms_ratio,
        attention=tuple(attention.mean(axis=0).tolist()) if attention.size else (),
        entropy=float(entropy.mean()) if attention.size else 0.0,
        bytes=facts.bytes,
        reason=next((score.reason for score in scores if score.status is not RewardStatus.OK), ""),
        unreadable=sum(score.unreadable for score in scores),
        unreadable_reason=next((score.reason for score in scores if score.unreadable), ""),
    )
