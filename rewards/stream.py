"""The endless order in which training prompts are issued."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from random import Random
from typing import Any

from rewards.config import DataConfig
from rewards.curriculum import Curriculum
from rewards.sources import Task
from rewards.splits import apportion
from rewards.verify import RewardsError
from rollout.types import Prompt

_LONGEST_CYCLE = 1000
_ORDERS_KEPT = 64


class PromptStream:
    """Prompt number 0, 1, 2, ... of the training stream, each a pure function of data seed and configuration, and
    for a task with a curriculum also of the way it has taken through its levels.

    Tasks take turns in a fixed cycle that follows their weights, so that every stretch of the stream
    holds them in nearly exact shares.  Each task goes through its whole train pool in a new random
    order before it repeats.
    """

    def __init__(self, tasks: Mapping[str, Task], data: DataConfig) -> None:
        """tasks: as made by `build_tasks(data)`.

        Raises:
            RewardsError: when a task's weight is too small to ever come up.
        """
        self._tasks = tasks
        self._seed = data.seed
        self._counts = _cycle_counts({name: task.config.weight for name, task in tasks.items()})
        self._cycle = _interleave(self._counts)
        self._orders: dict[tuple[str, int | None, int], list[int]] = {}
        self._curricula: dict[str, Curriculum] = {}
        self._pools: dict[tuple[str, int | None], Sequence[Prompt]] = {}
        for name, task in tasks.items():
            self._pools[name, None] = task.train
            if task.config.curriculum is not None:
                self._curricula[name] = Curriculum(task.config.curriculum)
                for level in task.config.curriculum.levels:
                    self._pools[name, level] = [p for p in task.train if p.payload["level"] == level]

    def prompt(self, ordinal: int, level: int | None = None) -> Prompt:
        """The prompt at a position of the stream, with that position as its `ordinal`.

        Args:
            level: of the task's curriculum when the prompt was issued, by whoever kept it; else the stream knows it
                of every prompt up to the present.  Nothing to a task without a curriculum.

        Raises:
            ValueError: when `ordinal` is negative.
        """
        if ordinal < 0:
            raise ValueError(f"the stream starts at ordinal 0, asked for {ordinal}")
        cycles, position = divmod(ordinal, len(self._cycle))
        name, turn = self._cycle[position]
        if name not in self._curricula:
            level = None  # a payload may have a level of its own
        elif level is None:
            level = self._curricula[name].level_of(ordinal)
        pool = self._pools[name, level]
        epoch, index = divmod(cycles * self._counts[name] + turn, len(pool))
        return replace(pool[self._order(name, level, epoch)[index]], ordinal=ordinal)

    def note(self, task: str, ordinal: int, right: float) -> None:
        """The share of right answers that a prompt got; see `Curriculum.note`."""
        if task in self._curricula:
            self._curricula[task].note(ordinal, right)

    def advance(self, unissued: int) -> None:
        """Moves the tasks' curricula; see `Curriculum.advance`."""
        for curriculum in self._curricula.values():
            curriculum.advance(unissued)

    def levels(self) -> dict[str, int]:
        """The present level of every task that has a curriculum."""
        return {name: curriculum.level for name, curriculum in self._curricula.items()}

    def identity(self) -> dict[str, Any]:
        """What tells this stream from others, as plain JSON data: a digest of every task's pools among it."""
        tasks = {name: {"turns": self._counts.get(name, 0), "pools": _digest(t)} for name, t in self._tasks.items()}
        return {"seed": self._seed, "tasks": tasks}

    def state(self) -> dict[str, Any]:
        """What a checkpoint notes, as plain JSON data; the position is the reader's own business."""
        return self.identity() | {"curricula": {name: each.state() for name, each in self._curricula.items()}}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Makes sure that this is the stream of a run that noted this `identity` (or `state`).

        Raises:
            RewardsError: naming what differs: the seed, the tasks or one task's share or prompts.
        """
        mine = self.identity()
        if identity.get("seed") != mine["seed"]:
            raise RewardsError(f"data.seed is {mine['seed']}, the run's was {identity.get('seed')}; take that")
        theirs = identity.get("tasks", {})
        if list(theirs) != list(mine["tasks"]):
            raise RewardsError(f"data.tasks are {list(mine['tasks'])}, the run's were {list(theirs)}")
        for name, noted in theirs.items():
            if noted.get("turns") != mine["tasks"][name]["turns"]:
                raise RewardsError(
                    f"the weight of task {name!r} differs from the run's: take the data section of its config.yaml, or "
                    "start a new run"
                )
            if noted.get("pools") != mine["tasks"][name]["pools"]:
                raise RewardsError(
                    f"the prompts of task {name!r} differ from the run's: put back its file, its plug-in or the "
                    "version of Reasoning Gym, or start a new run (of runs without data.json, some data sets' prompts "
                    "changed with PYTHONHASHSEED and come back with none)"
                )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, after making sure that this stream continues the one that noted it.

        Raises:
            RewardsError: see `check`.
        """
        self.check(state)
        for name, curriculum in self._curricula.items():
            curriculum.restore(state["curricula"][name])

    def _order(self, name: str, level: int | None, epoch: int) -> list[int]:
        key = (name, level, epoch)
        if key not in self._orders:
            if len(self._orders) >= _ORDERS_KEPT:
                self._orders.clear()
            order = list(range(len(self._pools[name, level])))
            Random(f"{self._seed}/{name}/epoch {epoch}").shuffle(order)
            self._orders[key] = order
        return self._orders[key]


def _cycle_counts(weights: Mapping[str, float]) -> dict[str, int]:
    """How many turns each task has in a cycle: the smallest whole numbers in the weights' proportion."""
    positive = {name: Fraction(weight).limit_denominator(10**6) for name, weight in weights.items() if weight > 0}
    scale = math.lcm(*(share.denominator for share in positive.values()))
    turns = {name: int(share * scale) for name, share in positive.items()}
    common = math.gcd(*turns.values())
    if common and sum(turns.values()) // common <= _LONGEST_CYCLE:
        counts = {name: count // common for name, count in turns.items()}
    else:
        counts = apportion({name: weights[name] for name in positive}, _LONGEST_CYCLE)
    for name, count in counts.items():
        if not count:
            raise RewardsError(
                f"task {name!r}: weight {weights[name]} is under 1/{_LONGEST_CYCLE} of the stream; raise it or set 0"
            )
    return counts


def _interleave(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """One cycle as (task, its turn in the cycle): always the task that is furthest behind its share."""
    length = sum(counts.values())
    given = dict.fromkeys(counts, 0)
    cycle = []
    for position in range(1, length + 1):
        name = max(counts, key=lambda task: counts[task] * position - given[task] * length)
        cycle.append((name, given[name]))
        given[name] += 1
    return cycle


def _digest(task: Task) -> str:
    """Hash over the task's pools, in their order."""
    digest = hashlib.sha256()
    for pool in (task.train, task.validation, task.test):
        for prompt in pool:
            digest.update(f"{prompt.text}\0{prompt.answer}\0".encode())
        digest.update(b"\1")
    return digest.hexdigest()[:32]
