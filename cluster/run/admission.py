"""Which prompts may start and which groups train next: a pure state machine, no I/O, no clock.

With B groups an update and staleness bound S, a prompt starts only while
`issued - terminal < (S + 1) * B`.  Batches take the oldest groups first, and none is formed after which
the open groups of some age would be more than the updates they have left can take: it is not enough to
wait for groups at the bound, they may be too many by then.  So the bound is strict, nothing finished is
thrown away, and slow prompts are not replaced by lucky fast ones.

Every issued prompt ends once: `trained`, `filtered` (no learning signal) or `dead` (failed too often).
A prompt whose call failed runs again.  After two failures in company it runs with nothing else under
way, and only failures there count against it: in company the fault is usually another's, or nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

ALONE_AFTER = 2  # failures in company until a prompt runs with nothing else under way


class AdmissionError(RuntimeError):
    """An event that cannot follow what happened before: a bug in the caller, never bad luck."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of what may be open at once, besides the staleness bound; never less than one update needs.

    groups: prompts started and not yet ended.  bytes: of finished groups that wait for their update.
    attempts: failures alone after which a prompt is dead.
    """

    groups: int | None = None
    bytes: int | None = None
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class Finished:
    """A scored group that waits for its update: the router version that produced it, and its size."""

    version: int
    bytes: int = 0


@dataclass
class Admission:
    """Prompts by ordinal.  `version` is the router's; every update raises it by one.

    updates: after so many the run ends, and no prompt starts that none of them would train.
    running: the version each prompt was started under.  failures: in company and alone, of open prompts.
    """

    groups_per_update: int
    max_staleness: int
    updates: int
    limits: Limits = Limits()
    version: int = 0
    next_ordinal: int = 0
    retry: list[int] = field(default_factory=list)
    running: dict[int, int] = field(default_factory=dict)
    finished: dict[int, Finished] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    filtered: set[int] = field(default_factory=set)
    dead: set[int] = field(default_factory=set)
    failures: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def open(self) -> int:
        """Prompts issued and not ended."""
        return len(self.retry) + len(self.running) + len(self.finished)

    @property
    def capacity(self) -> int:
        """How many prompts may start now, those to be run again among them."""
        started = len(self.running) + len(self.finished)
        needed = self.groups_per_update
        allowed = min(self.max_staleness + 1, self.updates - self.version) * needed
        if self.limits.groups is not None:
            allowed = min(allowed, max(self.limits.groups, needed))
        if self.limits.bytes is not None and sum(f.bytes for f in self.finished.values()) >= self.limits.bytes:
            allowed = min(allowed, needed)
        return allowed - started

    def issue(self, count: int) -> list[int]:
        """Starts up to `count` prompts under the current version, for one call; ones to be run again come first."""
        if any(map(self._runs_alone, self.running)):
            return []
        ordinals: list[int] = []
        for _ in range(min(count, self.capacity)):
            if self.retry and self._runs_alone(self.retry[0]) and self.running:
                break
            if self.retry:
                ordinal = self.retry.pop(0)
            else:
                ordinal, self.next_ordinal = self.next_ordinal, self.next_ordinal + 1
            self.running[ordinal] = self.version
            ordinals.append(ordinal)
            if self._runs_alone(ordinal):
                break
        return ordinals

    def upcoming(self, count: int) -> range:
        """What `issue(count)` would start next if there were room for all of it; empty at the end of the run."""
        if self.retry or (self.updates - self.version) * self.groups_per_update <= self.open:
            return range(0)
        return range(self.next_ordinal, self.next_ordinal + count)

    def finish(self, ordinals: Iterable[int], sizes: Mapping[int, int] | None = None) -> None:
        """These prompts' groups are scored; `sizes` are their bytes."""
        for ordinal in ordinals:
            version = self._leave(self.running, ordinal, "finished but was not running")
            self.finished[ordinal] = Finished(version, (sizes or {}).get(ordinal, 0))
            self.failures.pop(ordinal, None)

    def fail(self, ordinals: Iterable[int], blameless: bool = False) -> list[int]:
        """These prompts' call failed: they run again, except the returned ones, which are dead now.

        blameless: what failed is known and it was none of the prompts.
        """
        failed = list(ordinals)
        in_company = len(failed) > 1 or len(self.running) > 1
        died = []
        for ordinal in failed:
            self._leave(self.running, ordinal, "failed but was not running")
            shared, alone = self.failures.get(ordinal, (0, 0))
            if not blameless:
                shared, alone = (shared + 1, alone) if in_company else (shared, alone + 1)
                self.failures[ordinal] = (shared, alone)
            if alone >= self.limits.attempts:
                self.dead.add(ordinal)
                del self.failures[ordinal]
                died.append(ordinal)
            else:
                self.retry.append(ordinal)
        self.retry.sort()
        return died

    def drop(self, ordinals: Iterable[int]) -> None:
        """These finished groups are lost (the node that held them is): their prompts run again."""
        for ordinal in ordinals:
            self._leave(self.finished, ordinal, "was lost but had not finished")
            self.retry.append(ordinal)
        self.retry.sort()

    def filter(self, ordinals: Iterable[int]) -> None:
        """These groups have no signal and end here; others take their place in the update."""
        for ordinal in ordinals:
            self._leave(self.finished, ordinal, "was filtered but had not finished")
            self.filtered.add(ordinal)

    def batch(self) -> list[int] | None:
        """The ordinals of the next update, in order, or None while it has to wait."""
        chosen = self._oldest()
        if len(chosen) < self.groups_per_update or self._too_late(chosen) is not None:
            return None
        return sorted(chosen)

    @property
    def waits_for(self) -> list[int]:
        """Running prompts that the next update waits for: all of them while there are too few groups."""
        chosen = self._oldest()
        late = self._too_late(chosen)
        if late is None:
            return sorted(self.running) if len(chosen) < self.groups_per_update else []
        return sorted(ordinal for ordinal, version in self.running.items() if version <= late)

    def _oldest(self) -> list[int]:
        by_age = sorted(self.finished, key=lambda ordinal: (self.finished[ordinal].version, ordinal))
        return by_age[: self.groups_per_update]

    def _too_late(self, chosen: list[int]) -> int | None:
        """The newest version of groups that training `chosen` now would leave too few updates for, if any.

        Groups of versions up to v must all be trained in the updates V + 1 to v + S that remain to them.
        """
        left = [*self.running.values(), *(f.version for o, f in self.finished.items() if o not in set(chosen))]
        late = None
        for count, version in enumerate(sorted(left), start=1):
            if count > (version + self.max_staleness - self.version) * self.groups_per_update:
                late = version
        return late

    def train(self, ordinals: Iterable[int]) -> None:
        """An update on these groups is done: the version rises."""
        for ordinal in ordinals:
            entry = self._leave(self.finished, ordinal, "was trained but had not finished")
            if self.version - entry.version > self.max_staleness:
                raise AdmissionError(
                    f"prompt {ordinal} of version {entry.version} was trained at version {self.version}, "
                    f"more than max_staleness {self.max_staleness} later"
                )
            self.trained.add(ordinal)
        self.version += 1

    def state(self, keep_finished: bool = True) -> dict[str, Any]:
        """JSON-able; what is running is to be run again, and what is finished too unless it is kept."""
        again = [*self.retry, *self.running] + ([] if keep_finished else [*self.finished])
        return {
            "version": self.version,
            "next_ordinal": self.next_ordinal,
            "retry": sorted(again),
            "finished": {str(o): [f.version, f.bytes] for o, f in self.finished.items()} if keep_finished else {},
            "trained": ranges(self.trained),
            "filtered": ranges(self.filtered),
            "dead": ranges(self.dead),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`."""
        self.version, self.next_ordinal = state["version"], state["next_ordinal"]
        self.retry, self.running, self.failures = list(state["retry"]), {}, {}
        self.finished = {int(o): Finished(*entry) for o, entry in state["finished"].items()}
        self.trained, self.filtered = unranged(state["trained"]), unranged(state["filtered"])
        self.dead = unranged(state["dead"])

    def _runs_alone(self, ordinal: int) -> bool:
        shared, alone = self.failures.get(ordinal, (0, 0))
        return shared >= ALONE_AFTER or alone > 0

    @staticmethod
    def _leave(place: dict[int, T], ordinal: int, complaint: str) -> T:
        if ordinal not in place:
            raise AdmissionError(f"prompt {ordinal} {complaint}")
        return place.pop(ordinal)


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
