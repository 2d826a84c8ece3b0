"""Automatic difficulty: which level of a task's curriculum a prompt of the stream is drawn from.

A pure state machine.  The level of an ordinal is fixed once and for all: a move only ever concerns ordinals that were
not issued yet, so a prompt that is run again, or looked up in a log, is the same prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from typing import Any

from rewards.config import CurriculumConfig


class Curriculum:
    """One task's way through its levels."""

    def __init__(self, config: CurriculumConfig) -> None:
        self.config = config
        # From which ordinal on which place in `config.levels`.
        self._since: list[int] = [0]
        self._places: list[int] = [0]
        self._window: deque[float] = deque(maxlen=config.window)
        self._noted: dict[int, float] = {}

    @property
    def level(self) -> int:
        """Of the prompts that are issued next."""
        return self.config.levels[self._places[-1]]

    def level_of(self, ordinal: int) -> int:
        """The level of a prompt."""
        return self.config.levels[self._places[bisect_right(self._since, ordinal) - 1]]

    def note(self, ordinal: int, right: float) -> None:
        """The share of right answers that a prompt of the task got; it counts at the next `advance`."""
        self._noted[ordinal] = right

    def advance(self, unissued: int) -> None:
        """Moves, if what was noted says so; in the order of the ordinals, whatever came first.

        Args:
            unissued: the first ordinal that no prompt was drawn for yet: a move starts there.
        """
        noted, self._noted = self._noted, {}
        for ordinal, right in sorted(noted.items()):
            if self.level_of(ordinal) == self.level:  # others say nothing about the present level
                self._window.append(right)
            if len(self._window) == self.config.window:
                self._move(sum(self._window) / len(self._window), unissued)

    def _move(self, right: float, unissued: int) -> None:
        place = self._places[-1]
        if right >= self.config.raise_at and place + 1 < len(self.config.levels):
            place += 1
        elif right <= self.config.lower_at and place > 0:
            place -= 1
        else:
            return
        self._window.clear()
        if self._since[-1] == unissued:
            self._places[-1] = place
        else:
            self._since.append(unissued)
            self._places.append(place)

    def state(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "since": list(self._since),
            "places": list(self._places),
            "window": list(self._window),
            "noted": list(self._noted.items()),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`."""
        self._since, self._places = list(state["since"]), list(state["places"])
        self._window = deque(state["window"], maxlen=self.config.window)
        self._noted = dict(state["noted"])
