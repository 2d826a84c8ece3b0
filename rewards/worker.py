"""The reward worker: groups go in, the same groups with scores come out."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rewards.config import RewardsConfig
from rewards.pool import NOT_ASKED, ScoringProcess
from rewards.verifiers import WeightedSum
from rewards.verify import RewardsError, Verifier
from rollout.types import Group, Prompt, RewardStatus, Score

Answers = Sequence[tuple[Prompt, Sequence[str]]]


class RewardWorker:
    """Scores groups in warm processes of its own; wrapped as an actor, or used as it is.

    A call is scored in one process; a call that would wait for others starts a further process, up to
    `rewards.processes`, so that a slow verifier holds up its own call alone.  Every process has a thread that
    starts, feeds and kills it, because it ends with the thread that started it.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], config: RewardsConfig, index: int = 0) -> None:
        """Start the first scoring process and wait until it is warm.

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
        self._verifiers = {**verifiers, **binary}
        self._scored = dict.fromkeys(verifiers, 0)
        self._masked = dict.fromkeys(verifiers, 0)
        self._counting = threading.Lock()
        self._of_thread = threading.local()
        self._processes: list[ScoringProcess] = []
        self._threads = ThreadPoolExecutor(max_workers=config.processes, thread_name_prefix=f"reward-{index}")
        try:
            self._threads.submit(self._process).result()
        except RewardsError:
            self._threads.shutdown()
            raise

    async def score(self, groups: list[Group]) -> list[Group]:
        """The groups, in order, with one score per completion; see `score_groups`."""
        return _scored(groups, await self.score_answers_async(_answers(groups)))

    def score_groups(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, in order, with one score per completion.

        A completion whose verifier ran too long is TIMEOUT, one whose verifier failed is ERROR, each
        with its reason; neither is a reward of zero.

        Raises:
            RewardsError: a group's task has no verifier here, or scoring cannot go on.
        """
        return _scored(groups, self.score_answers(_answers(groups)))

    def score_answers(self, answers: Answers) -> list[list[Score]]:
        """One score for each of several answers to each prompt; see `score_groups`."""
        return self._threads.submit(self._score, answers).result()

    async def score_answers_async(self, answers: Answers) -> list[list[Score]]:
        """See `score_answers`."""
        return await asyncio.wrap_future(self._threads.submit(self._score, answers))

    def score_texts(self, answers: Sequence[tuple[Prompt, str]]) -> list[Score]:
        """One score per (prompt, answer), for answers that belong to no group; see `score_groups`."""
        return self._threads.submit(self._score_texts, answers).result()

    def describe(self) -> dict[str, Any]:
        """Name, scoring process ids, restarts so far, completions scored and masked per task."""
        return {
            "name": repr(self),
            "pids": [process.pid for process in self._processes],
            "restarts": sum(process.restarts for process in self._processes),
            "scored": dict(self._scored),
            "masked": dict(self._masked),
        }

    def close(self) -> None:
        """End the scoring processes, after the calls under way; may be called twice."""
        if not self._closed:
            self._closed = True
            self._threads.shutdown()
            for process in self._processes:
                process.close()

    def __repr__(self) -> str:
        return f"Reward({self._index})"

    def _score(self, answers: Answers) -> list[list[Score]]:
        for prompt, _ in answers:
            if prompt.task not in self._tasks:
                raise RewardsError(f"no verifier for task {prompt.task!r}; there are {sorted(self._tasks)}")
        # Equal answers to a prompt are judged once.
        items = [(prompt.task, text, prompt) for prompt, texts in answers for text in dict.fromkeys(texts)]
        verdicts = iter(zip(items, self._process().score(items), strict=True))
        known: dict[tuple[str, int], Score] = {}  # equal verdicts are one object
        scores = []
        for _, texts in answers:
            mine: dict[str, Score] = {}
            for (task, text, _), verdict in itertools.islice(verdicts, len(set(texts))):
                if (task, id(verdict)) not in known:
                    known[task, id(verdict)] = self._mapped(verdict, task)
                mine[text] = known[task, id(verdict)]
            scores.append([mine[text] for text in texts])
        with self._counting:
            for (prompt, _), given in zip(answers, scores, strict=True):
                self._scored[prompt.task] += len(given)
                self._masked[prompt.task] += sum(score.status is not RewardStatus.OK for score in given)
        return scores

    def _process(self) -> ScoringProcess:
        """This thread's own."""
        if not hasattr(self._of_thread, "process"):
            self._of_thread.process = ScoringProcess(self._verifiers, self._config.timeout_s, self._config.memory_mb)
            self._processes.append(self._of_thread.process)
        return self._of_thread.process

    def _score_texts(self, answers: Sequence[tuple[Prompt, str]]) -> list[Score]:
        items = [(prompt.task, text, prompt) for prompt, text in answers]
        return [self._mapped(s, task) for s, (task, *_) in zip(self._process().score(items), items, strict=True)]

    def _mapped(self, score: Score, task: str) -> Score:
        asked = not score.reason.endswith(NOT_ASKED)
        if score.status is RewardStatus.TIMEOUT and asked and self._config.on_timeout == "zero":
            return Score(reward=0.0, answer=0.0, reason=score.reason)
        if self._config.binary_at is None or score.status is not RewardStatus.OK or task in self._sums:
            return score
        binary = float(score.reward >= self._config.binary_at)
        return replace(score, reward=binary, answer=binary)


def _answers(groups: Sequence[Group]) -> Answers:
    return [(group.prompt, [completion.text for completion in group.completions]) for group in groups]


def _scored(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> list[Group]:
    return [group.scored(tuple(mine)) for group, mine in zip(groups, scores, strict=True)]
