"""What has been measured so far: every metric of a run as a series over steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Record = Mapping[str, object]
"""One step: `step`, its `ordinals`, and metrics by name.  Any metric may be missing."""

WEIGHT = 0.08
"""Weight of the newest value in a smoothed series: about the last 25 values count."""


@dataclass(slots=True)
class Series:
    """One metric.  `smoothed` is its exponential moving average, free of the bias towards the first value."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    _sum: float = 0.0
    _weight: float = 0.0

    def add(self, step: int, value: float) -> None:
        """Append a value; steps come in rising order."""
        self._sum += WEIGHT * (value - self._sum)
        self._weight += WEIGHT * (1 - self._weight)
        self.steps.append(step)
        self.values.append(value)
        self.smoothed.append(self._sum / self._weight)


class History:
    """All series of a run, fed one step record at a time."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.last: Record = {}
        self._series: dict[str, Series] = {}
        for record in records:
            self.add(record)

    @property
    def step(self) -> int:
        """The latest step, 0 before the first."""
        return as_step(self.last)

    def add(self, record: Record) -> None:
        """Take in one step.  Values that are no finite number are left out, as if missing."""
        step = as_step(record)
        self.last = record
        for name in record:
            value = number(record, name)
            if name != "step" and value is not None:
                self._series.setdefault(name, Series()).add(step, value)

    def series(self, name: str) -> Series:
        """A metric over steps, empty when it was never measured."""
        return self._series.get(name, Series())

    def latest(self, name: str) -> float | None:
        """A metric's value at the latest step, None when that step has none."""
        return number(self.last, name)

    def known(self, name: str) -> float | None:
        """A metric's newest value, from an earlier step if need be: not every step has every task."""
        values = self.series(name).values
        return values[-1] if values else None

    def smoothed(self, name: str) -> float | None:
        """A metric's newest smoothed value."""
        values = self.series(name).smoothed
        return values[-1] if values else None


def number(record: Record, name: str) -> float | None:
    """A record's metric, None when it is missing or no finite number."""
    value = record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def as_step(record: Record) -> int:
    """A record's step, 0 when it has none."""
    return int(number(record, "step") or 0)
