"""What every verifier is, and the error every part of this package raises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rollout.types import Prompt

_INTEGER = re.compile("[+-]?[0-9]+")
# What a verifier raises on an answer that is not of the form that it expects.
READING_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, SyntaxError, RecursionError,
)  # fmt: skip
_MOST_DIGITS = 1000  # an answer that goes on for longer is none


_TOLERANCE = 1e-9  # sums of floating-point numbers that should be 1


def is_right(score: float, binary_at: float | None = None) -> bool:
    """Whether a score is a right answer's: 1, or what `rewards.binary_at` says instead."""
    return score >= (1.0 if binary_at is None else binary_at) - _TOLERANCE


class RewardsError(ValueError):
    """A task, its data or its verifier is not usable; one line naming the setting and what to do."""


class Unreadable(ValueError):
    """Raised by a verifier for an answer that it cannot read: a wrong answer (score 0), counted as unreadable."""


class Verifier(Protocol):
    """Judges one completion.  Travels to the scoring process, so it must survive pickling."""

    def score(self, completion: str, prompt: Prompt) -> float:
        """The completion's score, usually in [0, 1]; the prompt holds the gold answer.

        Raises:
            Unreadable: the answer cannot be read.
        """
        ...


@runtime_checkable
class SelfTesting(Protocol):
    """A verifier that knows a right answer to every prompt.

    What it raises while reading an answer (`READING_ERRORS`) is the answer's fault, and so a wrong answer, if it still
    scores the right one 1 in a fresh process.
    """

    def known_good(self, prompt: Prompt) -> str | None:
        """A completion that is right, spelled otherwise than the gold answer alone; None if there is none."""
        ...


@runtime_checkable
class Preparable(Protocol):
    """A verifier that loads or builds something before it can score."""

    def prepare(self) -> None:
        """Does so, once for all processes that score."""
        ...


def integer(text: str) -> int | None:
    """The integer that `text` consists of, spaces around it allowed, or None."""
    stripped = text.strip()
    return int(stripped) if len(stripped) <= _MOST_DIGITS and _INTEGER.fullmatch(stripped) else None


@dataclass(frozen=True, slots=True)
class ExactInteger:
    """Scores 1 when the whole completion is the gold integer, spaces around it allowed, else 0."""

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        given = integer(completion)
        return float(given is not None and given == integer(prompt.answer))
