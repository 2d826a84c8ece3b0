"""The reward worker: groups go in, the same groups with scores come out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rewards.config import RewardsConfig
from rewards.pool import ScoringProcess
from rewards.verifiers import WeightedSum
from rewards.verify import RewardsError, Verifier
from rollout.types import Group, Prompt, RewardStatus, Score


class RewardWorker:
    """Scores groups in one warm process of its own; wrapped as an actor, or used as it is.

    Calls are served one after another.  One thread starts, feeds and kills the process, because
    the process ends with the thread that started it.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], config: RewardsConfig, index: int = 0) -> None:
        """Start the scoring process and wait until it is warm.

        verifiers: by task name, e.g. `{name: task.verifier for name, task in build_tasks(data).items()}`.
        index: this worker's number among its like.

        Raises:
            RewardsError: when the verifiers cannot be loaded in the scoring process.
        """
        self._config = config
        self._index = index
        self._closed = False
        self._tasks = frozenset(verifiers)
        self._sums = {name for name, verifier in verifiers.items() if isinstance(verifier, WeightedSum)}
        binary = {name: replace(v, binary_at=config.binary_at) for name, v in verifiers.items() if name in self._sums}  # type: ignore[type-var]
        verifiers = {**verifiers, **binary}
        self._scored = dict.fromkeys(verifiers, 0)
        self._masked = dict.fromkeys(verifiers, 0)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"reward-{index}")
        try:
            self._process = self._thread.submit(ScoringProcess, verifiers, config.timeout_s).result()
        except RewardsError:
            self._thread.shutdown()
            raise

    async def score(self, groups: list[Group]) -> list[Group]:
        """The groups, in order, with one score per completion; see `score_groups`."""
        return await asyncio.wrap_future(self._thread.submit(self._score, groups))

    def score_groups(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, in order, with one score per completion.

        A completion whose verifier ran too long is TIMEOUT, one whose verifier failed is ERROR, each
        with its reason; neither is a reward of zero.

        Raises:
            RewardsError: a group's task has no verifier here, or scoring cannot go on.
        """
        return self._thread.submit(self._score, groups).result()

    def score_texts(self, answers: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """One score per (prompt, answer), for answers that belong to no group; see `score_groups`."""
        return self._thread.submit(self._score_texts, answers).result()

    def describe(self) -> dict[str, Any]:
        """Name, scoring process id, restarts so far, completions scored and masked per task."""
        return {
            "name": repr(self),
            "pid": self._process.pid,
            "restarts": self._process.restarts,
            "scored": dict(self._scored),
            "masked": dict(self._masked),
        }

    def close(self) -> None:
        """End the scoring process, after the calls under way; may be called twice."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self._process.close).result()
            self._thread.shutdown()

    def __repr__(self) -> str:
        return f"Reward({self._index})"

    def _score(self, groups: Sequence[Group]) -> list[Group]:
        for group in groups:
            if group.prompt.task not in self._tasks:
                raise RewardsError(f"no verifier for task {group.prompt.task!r}; there are {sorted(self._tasks)}")
        items = [(group.prompt.task, c.text, group.prompt) for group in groups for c in group.completions]
        scores = iter(self._process.score(items))
        scored = [
            group.scored(tuple(self._mapped(next(scores), group.prompt.task) for _ in group.completions))
            for group in groups
        ]
        for group in scored:
            self._scored[group.prompt.task] += len(group.scores)
            self._masked[group.prompt.task] += sum(score.status is not RewardStatus.OK for score in group.scores)
        return scored

    def _score_texts(self, answers: Sequence[tuple[Prompt, str]]) -> list[Score]:
        items = [(prompt.task, text, prompt) for prompt, text in answers]
        return [self._mapped(s, task) for s, (task, *_) in zip(self._process.score(items), items, strict=True)]

    def _mapped(self, score: Score, task: str) -> Score:
        if score.status is RewardStatus.TIMEOUT and self._config.on_timeout == "zero":
            return Score(reward=0.0, answer=0.0, reason=score.reason)
        if self._config.binary_at is None or score.status is not RewardStatus.OK or task in self._sums:
            return score
        binary = float(score.reward >= self._config.binary_at)
        return replace(score, reward=binary, answer=binary)
