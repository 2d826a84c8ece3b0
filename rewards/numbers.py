"""The number that a solution ends with, and whether it is the right one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rollout.types import Prompt

_FRACTION = r"\\[dt]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}"
_DECIMAL = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\d)])-)?\s*(?:\$\s*-?\s*)?(?:{_FRACTION}|(?:{_DECIMAL})(?:\s*/\s*\d+)?)")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKED = re.compile(r"####\s*([^\n]*)")
_SPOKEN = re.compile(r"answer\s+is\s*:?(?=([^\n]*))", re.IGNORECASE)
# What makes a number a part of an expression: 3x, 2\pi, 10^3, \sqrt{2}, 5 + 3; not 5kg, 1000\text{ apples} or 12.\)
_BOUND_BEFORE = re.compile(r"[A-Za-z_^{]$")
_BOUND_AFTER = re.compile(r"[A-Za-z](?![A-Za-z])|_|\s*\^|\s*\\(?!text|\)|\]|%|,|;| |\$)|\s*[-+*/]\s*[\d\\(]")
_MOST_DIGITS = 1000  # an answer that goes on for longer is none


@dataclass(frozen=True, slots=True)
class NumberVerifier:
    """Scores 1 when the completion's final number equals the gold answer exactly, else 0."""

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        given = final_number(completion)
        return float(given is not None and given == number(prompt.answer))


def final_part(text: str) -> str | None:
    r"""What a solution names as its answer: the last \boxed{}, else the last "####", else the last "answer is".

    None when none of them is there.
    """
    for marker in (_BOXED, _MARKED, _SPOKEN):
        if found := marker.findall(text):
            return found[-1]
    return None


def final_number(text: str) -> Fraction | None:
    r"""The number that a solution ends with: the first of its final part, or the last of the text without one.

    None for a \boxed{} with several numbers, which would name more than one answer.
    """
    part = final_part(text)
    numbers = list(_NUMBER.finditer(text if part is None else part))
    if not numbers or (len(numbers) > 1 and _BOXED.search(text)):
        return None
    found = numbers[-1 if part is None else 0]
    before, after = found.string[: found.start()], found.string[found.end() :]
    touches = not found.group()[0].isspace()
    if (touches and _BOUND_BEFORE.search(before)) or _BOUND_AFTER.match(after):
        return None
    return number(found.group())


def number(text: str) -> Fraction | None:
    r"""The exact value of "1,000", "$1,000", "1000.0", "3/4" or "\frac{3}{4}"; None for anything else."""
    if len(text) > _MOST_DIGITS:
        return None
    plain = re.sub(r"[\s$,]", "", text).rstrip(".")
    if found := re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", plain):
        plain = "{}{}/{}".format(*found.groups())
    top, _, bottom = plain.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or "1")
    except (ValueError, ZeroDivisionError):
        return None
