"""Which prompts may start and which groups train next: a pure state machine, no I/O, no clock.

With B groups an update and staleness bound S, a prompt starts only while
`issued - terminal < (S + 1) * B`.  Batches take the oldest groups first, and none is formed that
would leave an unfinished group to be trained more than S versions after it was produced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class AdmissionError(RuntimeError):
    """An event that cannot follow what happened before: a bug in the caller, never bad luck."""


@dataclass
class Admission:
    """Prompts by ordinal.  `version` is the router's; every update raises it by one.

    updates: after so many the run ends, and no prompt starts that none of them would train.
    """

    groups_per_update: int
    max_staleness: int
    updates: int
    version: int = 0
    next_ordinal: int = 0
    retry: list[int] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)

    @property
    def capacity(self) -> int:
        """How many more prompts may start now."""
        open_prompts = len(self.running) + len(self.finished)
        updates_ahead = min(self.max_staleness + 1, self.updates - self.version)
        return updates_ahead * self.groups_per_update - open_prompts

    def issue(self, count: int) -> list[int]:
        """Starts up to `count` prompts under the current version; ones to be run again come first."""
        ordinals = []
        for _ in range(min(count, self.capacity)):
            if self.retry:
                ordinal = self.retry.pop(0)
            else:
                ordinal, self.next_ordinal = self.next_ordinal, self.next_ordinal + 1
            self.running[ordinal] = self.version
            ordinals.append(ordinal)
        return ordinals

    def finish(self, ordinals: Iterable[int]) -> None:
        """These prompts' groups are scored."""
        for ordinal in ordinals:
            if ordinal not in self.running:
                raise AdmissionError(f"prompt {ordinal} finished but was not running")
            self.finished[ordinal] = self.running.pop(ordinal)

    def batch(self) -> list[int] | None:
        """The ordinals of the next update, in order, or None while it has to wait."""
        oldest = sorted(self.finished, key=lambda ordinal: (self.finished[ordinal], ordinal))
        if len(oldest) < self.groups_per_update:
            return None
        too_old = self.version - self.max_staleness
        if any(version <= too_old for version in self.running.values()):
            return None
        return sorted(oldest[: self.groups_per_update])

    def train(self, ordinals: Iterable[int]) -> None:
        """An update on these groups is done: the version rises."""
        for ordinal in ordinals:
            if ordinal not in self.finished:
                raise AdmissionError(f"prompt {ordinal} was trained but had not finished")
            del self.finished[ordinal]
            self.trained.add(ordinal)
        self.version += 1

    def state(self) -> dict[str, Any]:
        """JSON-able; what is running or finished but untrained is to be run again."""
        pending = sorted([*self.retry, *self.running, *self.finished])
        return {
            "version": self.version,
            "next_ordinal": self.next_ordinal,
            "retry": pending,
            "trained": ranges(self.trained),
            "dead": ranges(self.dead),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        self.version, self.next_ordinal = state["version"], state["next_ordinal"]
        self.retry, self.running, self.finished = list(state["retry"]), {}, {}
        self.trained, self.dead = unranged(state["trained"]), unranged(state["dead"])


def ranges(ordinals: set[int]) -> list[list[int]]:
    """A set of integers as [first, last] runs."""
    runs: list[list[int]] = []
    for ordinal in sorted(ordinals):
        if runs and runs[-1][1] == ordinal - 1:
            runs[-1][1] = ordinal
        else:
            runs.append([ordinal, ordinal])
    return runs


def unranged(runs: list[list[int]]) -> set[int]:
    """The set behind `ranges`."""
    return {ordinal for first, last in runs for ordinal in range(first, last + 1)}
