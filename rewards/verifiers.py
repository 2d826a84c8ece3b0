"""Verifiers that any task can have, and rewards that add up from several terms."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rewards.config import RewardTerm, TaskConfig
from rewards.numbers import NumberVerifier, final_part
from rewards.verify import ExactInteger, RewardsError, Unreadable, Verifier, is_right
from rollout.types import Prompt

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LONGEST_EXPRESSION = 400  # characters; parsing takes time that grows quickly


@dataclass(frozen=True, slots=True)
class TextVerifier:
    """Scores 1 when the completion, or its final part, is the gold answer, apart from case and spaces.

    The final part is what stands between the last <answer> and </answer>, else see `final_part`.
    """

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        tagged = _TAGGED.findall(completion)
        part = tagged[-1] if tagged else final_part(completion)
        return float(_plain(prompt.answer) == _plain(completion if part is None else part))


@dataclass(frozen=True, slots=True)
class MathVerifier:
    """Scores 1 when the final part of the completion (or its last line) equals the gold answer, else 0.

    Equal means: the same number exactly, or the same expression to math-verify.
    """

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        if NumberVerifier().score(completion, prompt):
            return 1.0
        part = final_part(completion)
        if part is None:
            lines = completion.strip().splitlines()
            part = lines[-1] if lines else ""
        if not part.strip() or len(part) > _LONGEST_EXPRESSION:
            return 0.0
        return float(_equal_expressions(prompt.answer, part))


class FunctionVerifier:
    """`module:function` of the user's own, called with completion and prompt."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def _function(self) -> Callable[[str, Prompt], Any]:
        module, _, name = self.name.partition(":")
        found = getattr(importlib.import_module(module), name)
        if not callable(found):
            raise TypeError(f"{self.name} is no function")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name}

    def check(self, task: str) -> None:
        """Import it.

        Raises:
            RewardsError: when that fails.
        """
        try:
            _ = self._function
        except (ImportError, AttributeError, TypeError) as error:
            raise RewardsError(
                f"task {task!r}: {self.name!r} cannot be used: {error}; is it on the PYTHONPATH?"
            ) from error

    def score(self, completion: str, prompt: Prompt) -> Any:
        """Whatever the function says; the scoring process looks at it."""
        return self._function(completion, prompt)


@dataclass(frozen=True, slots=True)
class FormatTerm:
    """1 when the pattern is found in the completion, else 0."""

    pattern: str

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        return float(re.search(self.pattern, completion, re.DOTALL) is not None)


@dataclass(frozen=True, slots=True)
class LengthTerm:
    """1 up to so many characters, falling linearly to 0 at twice as many."""

    characters: int

    def score(self, completion: str, prompt: Prompt) -> float:
        """In [0, 1]."""
        return min(1.0, max(0.0, 2.0 - len(completion) / self.characters))


@dataclass(frozen=True)
class WeightedSum:
    """A reward that adds up; `answer` alone says whether a completion is right.

    binary_at: as in the `rewards` section, for the answer's score.
    """

    answer: Verifier
    terms: tuple[tuple[float, Verifier], ...]
    binary_at: float | None = None

    def judge(self, completion: str, prompt: Prompt) -> tuple[float, float]:
        """The reward, and the answer's own score."""
        return self.total(self.answer.score(completion, prompt), completion, prompt)

    def total(self, score: float, completion: str, prompt: Prompt) -> tuple[float, float]:
        """The reward of an answer with this score, and what the score counts for.

        A term that cannot read the completion adds nothing.
        """
        right = score if self.binary_at is None else float(is_right(score, self.binary_at))
        scores = (right if term is self.answer else _term_score(term, completion, prompt) for _, term in self.terms)
        return sum(weight * given for (weight, _), given in zip(self.terms, scores, strict=True)), right

    def score(self, completion: str, prompt: Prompt) -> float:
        """The reward."""
        return self.judge(completion, prompt)[0]


def _term_score(term: Verifier, completion: str, prompt: Prompt) -> float:
    try:
        return term.score(completion, prompt)
    except Unreadable:
        return 0.0


def with_settings(task: TaskConfig, own: Verifier) -> Verifier:
    """The task's verifier as configured: `verifier` instead of its source's own, and `rewards` on top.

    Raises:
        RewardsError: when a `module:function` cannot be imported.
    """
    answer = own if task.verifier is None else _named(task, task.verifier)
    if not task.rewards:
        return answer
    return WeightedSum(answer, tuple((term.weight, _term(task, term, answer)) for term in task.rewards))


def _named(task: TaskConfig, name: str) -> Verifier:
    known: dict[str, Callable[[], Verifier]] = {
        "number": NumberVerifier,
        "math": MathVerifier,
        "integer": ExactInteger,
        "text": TextVerifier,
    }
    if name in known:
        return known[name]()
    function = FunctionVerifier(name)
    function.check(task.name)
    return function


def _term(task: TaskConfig, term: RewardTerm, answer: Verifier) -> Verifier:
    if term.kind == "answer":
        return answer
    if term.kind == "format":
        return FormatTerm(term.pattern)
    if term.kind == "length":
        return LengthTerm(term.characters)
    return _named(task, term.kind)


def _equal_expressions(one: str, other: str) -> bool:
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    from math_verify import parse, verify

    # Without its own alarms, which would turn a time-out into a wrong answer: the scoring process has a limit.
    gold, given = (parse(f"${_bare(text)}$", parsing_timeout=None) for text in (one, other))
    return bool(gold) and bool(given) and bool(verify(gold[:1], given[:1], timeout_seconds=None))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _bare(text: str) -> str:
    return text.strip().strip("$").rstrip(".").strip()
