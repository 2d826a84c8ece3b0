"""Verifiers that any task can have, and rewards that add up from several terms."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rewards.answers import marked_part, plain_text, stated_text
from rewards.config import RewardTerm, TaskConfig
from rewards.latex import equal as equal_expressions
from rewards.numbers import NumberVerifier, final_number, number
from rewards.verify import ExactInteger, RewardsError, Unreadable, Verifier, is_right
from rollout.types import Prompt

_MOST_MARKUP = 1000  # characters around a text
_LONGEST_SENTENCE = 2000  # characters around a formula
_FORMULA = re.compile(r"\$\$[^$]+\$\$|(?<!\\)\$[^$]+\$|\\\([^\n]+?\\\)|\\\[[^\n]+?\\\]")
_ONLY_CONNECTORS = re.compile(r"(?:[\s,;.*_]|\band\b|\bor\b)*+")
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively|otherwise)\b")


@dataclass(frozen=True, slots=True)
class TextVerifier:
    """Scores 1 when what the completion states as its answer is the gold answer as a text, else 0.

    That is its marked part, or all of it where nothing is marked; see `rewards.answers`.
    """

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        if completion.strip() == prompt.answer.strip() != "":
            return 1.0
        gold, given = (_part_or_all(text) for text in (prompt.answer, stated_text(completion, prompt)))
        # What is much longer than the gold answer cannot become equal to it: only markup is taken away.
        return float(len(given) <= _MOST_MARKUP + 4 * len(gold) and plain_text(given) == plain_text(gold) != "")


@dataclass(frozen=True, slots=True)
class MathVerifier:
    """Scores 1 when what the completion states as its answer equals the gold answer, else 0.

    Equal means: the same number exactly, the same text, or the same expression to math-verify as `rewards.latex`
    uses it.  28% is 0.28.
    """

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        if completion.strip() == prompt.answer.strip() != "":
            return 1.0
        text, gold = stated_text(completion, prompt), _part_or_all(prompt.answer)
        expected = number(gold, mathematics=True)
        if expected is not None and (given := final_number(text, mathematics=True)) is not None:
            return float(given == expected)
        part = marked_part(text)
        formula = _formula(_last_line(text) if part is None else part, first=part is not None)
        if formula is None or (expected is not None and formula != (_last_line(text) if part is None else part)):
            return 0.0
        return float(plain_text(formula) == plain_text(gold) != "" or equal_expressions(gold, formula))


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


def _part_or_all(text: str) -> str:
    part = marked_part(text)
    return text if part is None else part


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]


def _formula(part: str, first: bool) -> str | None:
    """The formula of a part: the part itself, or the first (else the last) of those that its sentence embeds.

    None when the part is too long, or offers one formula or another.
    """
    if len(part) > _LONGEST_SENTENCE:
        return None
    spans = _FORMULA.findall(part)
    around = _FORMULA.sub(" ", part).lower()
    if not spans or _ONLY_CONNECTORS.fullmatch(around):
        return part
    if len(spans) > 1 and _HEDGE.search(around):
        return None
    return str(spans[0 if first else -1])
