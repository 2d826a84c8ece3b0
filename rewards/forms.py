"""Answers to composed tasks that are no integer: another form of one, or a comparison of two.

docs/tasks.md, "Composed tasks", has the rules in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from rewards.answers import marked_part, plain_text, stated_text
from rollout.types import Prompt

LARGEST_WORDS, LARGEST_ROMAN = 999_999, 3999
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ROMAN = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"),
    (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
_HYPHEN = re.compile(r"(?<=[a-z])[-\u2010\u2011](?=[a-z])")
_AND = re.compile(r"\b(hundred|thousand),? and(?= [a-z])")
_SENTENCE = re.compile(
    r"(?:(?:So|Thus|Hence|Therefore),? t|T)he (?:final |correct |right )?(?:answer|result|number) is"
    r" (?P<number>[+-]?[0-9]{1,18})\."
)
_LONGEST = 200  # characters of what states an answer


def number_words(value: int) -> str | None:
    """An integer in English, without "and"; None beyond 999,999 in either direction."""
    if abs(value) > LARGEST_WORDS:
        return None
    return f"minus {_positive_words(-value)}" if value < 0 else _positive_words(value)


def roman_numeral(value: int) -> str | None:
    """An integer as a Roman numeral; None outside 1 to 3999."""
    if not 1 <= value <= LARGEST_ROMAN:
        return None
    numeral = ""
    for size, letters in _ROMAN:
        count, value = divmod(value, size)
        numeral += letters * count
    return numeral


def parity(value: int) -> str:
    """`even` or `odd`."""
    return "odd" if value % 2 else "even"


def sentence(value: int) -> str:
    """A sentence that states an integer."""
    return f"The answer is {value}."


def larger(first: int, second: int) -> str:
    """Which of two integers is larger: `first`, `second` or `equal`."""
    return "equal" if first == second else "first" if first > second else "second"


@dataclass(frozen=True, slots=True)
class Form:
    """An operation whose answer is no integer.

    request: the line behind the parts' questions.
    write: the gold answer, from the parts' answers; None where they have none.
    """

    request: str
    write: Callable[..., str | None]


FORMS = {
    "words": Form("Write the answer in English words.", number_words),
    "roman": Form("Write the answer as a Roman numeral.", roman_numeral),
    "parity": Form("Is the answer odd or even?", parity),
    "sentence": Form('Write a sentence that begins with "The answer is" and ends with a full stop.', sentence),
    "larger": Form(
        "Which of the two answers is larger, the first or the second? Write first, second or equal.", larger
    ),
}


@dataclass(frozen=True, slots=True)
class FormVerifier:
    """Scores 1 when what the completion states as its answer is the gold answer in the operation's form, else 0.

    operation: a key of `FORMS`.
    """

    operation: str

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        given = form_of(self.operation, stated_text(completion, prompt))
        return float(given is not None and given == form_of(self.operation, prompt.answer))


def form_of(operation: str, text: str) -> str | None:
    """What a text states in the operation's form, in one spelling; None where it is not on one line."""
    if operation == "sentence":
        found = _SENTENCE.fullmatch(text.strip())
        return None if found is None else str(int(found["number"]))
    part = marked_part(text)
    part = (text if part is None else part).strip()
    if len(part) > _LONGEST or len(part.splitlines()) != 1:
        return None
    plain = plain_text(part)
    if operation == "words":
        return _one_spelling(plain)
    return plain.removeprefix("the ") if operation == "larger" else plain


def _one_spelling(plain: str) -> str:
    """Number words without hyphens, without "and" and commas where these are usual, and without "a" for "one"."""
    plain = _AND.sub(r"\1", _HYPHEN.sub(" ", plain)).replace("thousand, ", "thousand ")
    plain = re.sub(r"^negative (?=[a-z])", "minus ", plain)
    return re.sub(r"^(minus )?a (?=hundred\b|thousand\b)", r"\1one ", plain)


def _positive_words(value: int) -> str:
    if value < 20:
        return _UNITS[value]
    if value < 100:
        return _TENS[value // 10] + (f"-{_UNITS[value % 10]}" if value % 10 else "")
    size, name = (1000, "thousand") if value >= 1000 else (100, "hundred")
    rest = f" {_positive_words(value % size)}" if value % size else ""
    return f"{_positive_words(value // size)} {name}{rest}"
