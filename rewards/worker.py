"""The reward worker: groups go in, the same groups with scores come out."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rewards import jail
from rewards.child import Item, Limits
from rewards.config import RewardsConfig
from rewards.pool import NOT_ASKED, ScoringProcess
from rewards.verifiers import WeightedSum
from rewards.verify import RewardsError, Verifier, is_right
from rewards.zygote import Zygote
from rollout.types import Group, Prompt, RewardStatus, Score

Answers = Sequence[tuple[Prompt, Sequence[str]]]
_CPU_PER_TIMEOUT = 4  # seconds of processor time that a scoring process may use for each second of `rewards.timeout_s`


class RewardWorker:
    """Scores groups in warm processes of its own; wrapped as an actor, or used as it is.

    A call is scored in one process; a call that would wait for others starts a further process, up to
    `rewards.processes`, so that a slow verifier holds up its own call alone.  Every process has a thread that feeds
    and ends it.  Tasks that are let out of the jail (`rewards.jail_exempt`) have processes of their own.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], config: RewardsConfig, index: int = 0) -> None:
        """Load the verifiers, start the first scoring process.

        verifiers: by task name, e.g. `{name: task.verifier for name, task in build_tasks(data).items()}`.
        index: this worker's number among its like.

        Raises:
            RewardsError: when the verifiers cannot be loaded, or not be confined as `rewards.jail: require` wants.
        """
        self._config = config
        self._index = index
        self._closed = False
        self._sums = {name for name, verifier in verifiers.items() if isinstance(verifier, WeightedSum)}
        binary = {name: replace(v, binary_at=config.binary_at) for name, v in verifiers.items() if name in self._sums}  # type: ignore[type-var]
        self._zygotes = _zygotes({**verifiers, **binary}, config)
        self._scored = dict.fromkeys(verifiers, 0)
        self._masked = dict.fromkeys(verifiers, 0)
        self._unreadable = dict.fromkeys(verifiers, 0)
        self._counting = threading.Lock()
        self._of_thread = threading.local()
        self._processes: list[ScoringProcess] = []
        self._threads = ThreadPoolExecutor(max_workers=config.processes, thread_name_prefix=f"reward-{index}")
        try:
            for name in {id(zygote): name for name, zygote in self._zygotes.items()}.values():
                self._threads.submit(self._process, name).result()
        except RewardsError:
            self.close()
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
        """Name, scoring process ids, restarts so far, completions scored, masked and unreadable per task."""
        return {
            "name": repr(self),
            "pids": [process.pid for process in self._processes],
            "restarts": sum(process.restarts for process in self._processes),
            "scored": dict(self._scored),
            "masked": dict(self._masked),
            "unreadable": dict(self._unreadable),
        }

    def close(self) -> None:
        """End the scoring processes, after the calls under way; may be called twice."""
        if not self._closed:
            self._closed = True
            self._threads.shutdown()
            for process in self._processes:
                process.close()
            for zygote in self._zygotes.values():
                zygote.close()

    def __repr__(self) -> str:
        return f"Reward({self._index})"

    def _score(self, answers: Answers) -> list[list[Score]]:
        # Equal answers to a prompt are judged once.
        items = [(prompt.task, text, prompt) for prompt, texts in answers for text in dict.fromkeys(texts)]
        verdicts = iter(zip(items, self._judge(items), strict=True))
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
                self._unreadable[prompt.task] += sum(score.unreadable for score in given)
        return scores

    def _judge(self, items: Sequence[Item]) -> list[Score]:
        """Scores as the verifiers gave them, of tasks in the jail and out of it."""
        tasks = list(dict.fromkeys([task for task, _, _ in items]))
        if unknown := [task for task in tasks if task not in self._zygotes]:
            raise RewardsError(f"no verifier for task {unknown[0]!r}; there are {sorted(self._zygotes)}")
        processes = {task: self._process(task) for task in tasks}
        if len(set(processes.values())) == 1:
            return processes[tasks[0]].score(items)
        found: dict[int, Score] = {}
        for process in dict.fromkeys(processes.values()):
            places = [place for place, (task, _, _) in enumerate(items) if processes[task] is process]
            found |= zip(places, process.score([items[place] for place in places]), strict=True)
        return [found[place] for place in range(len(items))]

    def _process(self, task: str) -> ScoringProcess:
        """This thread's own for a task."""
        mine: dict[int, ScoringProcess] = self._of_thread.__dict__.setdefault("processes", {})
        zygote = self._zygotes[task]
        if id(zygote) not in mine:
            reuse = 1 if self._config.isolate == "completion" else self._config.reuse
            mine[id(zygote)] = ScoringProcess(zygote, self._config.timeout_s, reuse)
            self._processes.append(mine[id(zygote)])
        return mine[id(zygote)]

    def _score_texts(self, answers: Sequence[tuple[Prompt, str]]) -> list[Score]:
        items = [(prompt.task, text, prompt) for prompt, text in answers]
        return [self._mapped(s, task) for s, (task, *_) in zip(self._judge(items), items, strict=True)]

    def _mapped(self, score: Score, task: str) -> Score:
        asked = not score.reason.endswith(NOT_ASKED)
        if score.status is RewardStatus.TIMEOUT and asked and self._config.on_timeout == "zero":
            return Score(reward=0.0, answer=0.0, reason=score.reason)
        if score.status is not RewardStatus.OK:
            return score
        right = float(is_right(score.right, self._config.binary_at))
        shaped = self._config.binary_at is None or task in self._sums
        return replace(score, reward=score.reward if shaped else right, answer=right)


def _zygotes(verifiers: Mapping[str, Verifier], config: RewardsConfig) -> dict[str, Zygote]:
    """By task: one for those in the jail, one for those let out of it."""
    found = jail.kernel()
    if config.jail == "require" and found.missing:
        raise RewardsError(
            f"rewards.jail: require, but this machine's kernel has no {' and no '.join(found.missing)}: "
            "set best_effort to do without, or off"
        )
    jailed = {name for name in verifiers if config.jail != "off" and name not in config.jail_exempt}
    cpu_s = math.ceil(_CPU_PER_TIMEOUT * config.timeout_s) + _CPU_PER_TIMEOUT
    limits = Limits(int(config.memory_mb * 2**20), cpu_s, jailed=True, kernel=found)
    zygotes: dict[str, Zygote] = {}
    for names, mine in ((jailed, limits), (set(verifiers) - jailed, replace(limits, jailed=False))):
        if names:
            zygotes |= dict.fromkeys(names, Zygote({n: v for n, v in verifiers.items() if n in names}, mine))
    return zygotes


def _answers(groups: Sequence[Group]) -> Answers:
    return [(group.prompt, [completion.text for completion in group.completions]) for group in groups]


def _scored(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> list[Group]:
    return [group.scored(tuple(mine)) for group, mine in zip(groups, scores, strict=True)]
