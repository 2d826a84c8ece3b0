"""The number that a completion states as its answer, and whether it is the right one.

Every arithmetic expression of the text becomes one `_Value`, and one of the values is the answer.  docs/tasks.md, "How
an answer is read", has the rules in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from rewards.answers import marked_part, stated_text
from rewards.arithmetic import FRACTIONS, SIGNS, Arithmetic, NotRead, Token, tokens_of
from rollout.types import Prompt

_LONGEST_PART = 2000  # characters that are read of the part that holds the answer
_PLAIN = re.compile(r"\s*+(-?[0-9]{1,18})\.?\s*+")  # most answers, read without tokens
# One letter behind a number that is a unit; any other is a variable: 18m, 18 h; not 3x.
_LETTER_UNITS = frozenset("mgshdtlLCFKNJWVA")
_VARIABLES, _UNKNOWNS = frozenset("abcnxyz"), frozenset("xyz")
_FUNCTIONS = ("pi", "sqrt", "log", "ln", "sin", "cos", "tan", "exp")
_HEDGES = frozenset(("or", "maybe", "perhaps", "possibly", "alternatively", "otherwise"))
_CONNECTORS = frozenset(
    ("and", "to", "through", "till", "until", "by", "vs", "versus", "nor", "between", "from", "either", "both", "also",
     "even", "then", "about", "around", "approximately", "roughly")
)  # fmt: skip
_PARTICLES = frozenset(
    ("of", "out", "in", "on", "at", "for", "with", "per", "after", "before", "than", "is", "are", "was", "because",
     "since", "as", "so", "if", "when", "but", "the", "times")
)  # fmt: skip
_NEGATIONS = frozenset(("not", "never", "neither", "nor", "isn't", "than"))
_MOST_HEDGING = 5  # words between two values, one of them "or"
_ENDS = ("number", "close", "percent")  # tokens that an expression ends with
_JOINING = ("separator", "open", "close", "percent")


@dataclass(frozen=True, slots=True)
class NumberVerifier:
    """Scores 1 when the completion's final number equals the gold answer exactly, else 0."""

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        if completion.strip() == prompt.answer.strip() != "":
            return 1.0
        given = final_number(stated_text(completion, prompt))
        return float(given is not None and given == number(prompt.answer))


def final_number(text: str, mathematics: bool = False) -> Fraction | None:
    """The number that a text states as its answer: see `marked_part`, else the last number of the text.

    mathematics: a percent sign divides by 100 and "!" is a factorial; otherwise they are a unit and punctuation.

    None when there is no number, when it is a part of an expression that is none, or when others stand beside it.
    """
    part = marked_part(text)
    if part is None:
        return _last_number(_last_line(text), mathematics)
    return first_number(part, mathematics)


def first_number(part: str, mathematics: bool = False) -> Fraction | None:
    """The first number of a part that states the answer, or the last in its chain of equals signs."""
    if len(part) > _LONGEST_PART:
        part = part[:_LONGEST_PART].rpartition(" ")[0]
    if plain := _PLAIN.fullmatch(part):
        return Fraction(int(plain[1]))
    tokens = _read(part)
    chains = _chains(tokens, _values(tokens, mathematics))
    return _unrivalled(tokens, chains, lambda kept, other: (kept, other))


def _last_number(line: str, mathematics: bool) -> Fraction | None:
    if plain := _PLAIN.fullmatch(line):
        return Fraction(int(plain[1]))
    tokens = _read(line)
    chains = _chains(tokens, _values(tokens, mathematics))
    return _unrivalled(tokens, chains[::-1], lambda kept, other: (other, kept))


def number(text: str, mathematics: bool = False) -> Fraction | None:
    r"""The exact value of a text that is one number: "1,000", "$1,000", "3/4", "\frac{3}{4}", "1.8 \times 10^3".

    None for anything else, sums and differences among them ("2024-01-15"), and for what is too large to be written out.
    """
    if plain := _PLAIN.fullmatch(text):
        return Fraction(int(plain[1]))
    if len(text) > _LONGEST_PART:
        return None
    tokens = _read(text)
    while tokens and tokens[-1].text == ".":
        tokens.pop()
    values = _values(tokens, mathematics)
    if len(values) != 1 or (values[0].first, values[0].last) != (0, len(tokens)):
        return None
    if any(second.text in ("+", "-") and first.kind in _ENDS for first, second in pairwise(tokens)):
        return None
    return values[0].number


class _Value(NamedTuple):
    """An arithmetic expression.

    number: its value; None where it is a part of an expression that is no number, or too large.
    first, last: its tokens are [first, last).
    unit: the word behind it, empty if there is none.
    steps: how many values an equals sign has joined into it.
    """

    number: Fraction | None
    first: int
    last: int
    unit: str
    steps: int = 1


def _last_line(text: str) -> str:
    """The last line with a digit, without what goes beyond the limit."""
    digits = "0123456789" if text.isascii() else "0123456789" + "".join(FRACTIONS)
    last = max(text.rfind(digit) for digit in digits)
    if last < 0:
        return ""
    start = max(text.rfind("\n", 0, last), text.rfind("\r", 0, last)) + 1
    end = text.find("\n", last)
    line = text[start : len(text) if end < 0 else end]
    return line if len(line) <= _LONGEST_PART else line[-_LONGEST_PART:].partition(" ")[2]


def _values(tokens: Sequence[Token], mathematics: bool) -> list[_Value]:
    """Every arithmetic expression of the tokens, in order."""
    values = []
    at = 0
    while at < len(tokens):
        if not _starts(tokens, at):
            at += 1
            continue
        try:
            found = Arithmetic(tokens, mathematics).sum(at)
        except NotRead:
            values.append(_Value(None, at, at + 1, ""))
            at += 1
            continue
        if found is None:
            at += 1
            continue
        amount, last = found
        whole = not _bound_before(tokens, at) and not _bound_after(tokens, last, mathematics)
        unit = tokens[last].text if last < len(tokens) and tokens[last].kind == "word" else ""
        values.append(_Value(amount if whole else None, at, last, unit.lower()))
        at = last
    return values


def _read(text: str) -> list[Token]:
    """The tokens of a text; a unit with a divisor or an exponent behind a number is one word: km/h, cm^2, m/s^2."""
    tokens = tokens_of(text)
    found: list[Token] = []
    at = 0
    while at < len(tokens):
        end = at + 1
        if found and found[-1].kind in (*_ENDS, "fraction") and _names_unit(tokens[at]):
            touches = found[-1].end == tokens[at].start and len(tokens[at].text) == 1
            end = _unit_end(tokens, at, touches)
        whole = "".join(token.text for token in tokens[at:end])
        found.append(tokens[at]._replace(text=whole, end=tokens[end - 1].end))
        at = end
    return found


def _unit_end(tokens: Sequence[Token], at: int, touches: bool) -> int:
    """The first token behind a unit; no letter that touches its number has an exponent: 3m^2."""
    end = at + 1
    while end < len(tokens):
        kinds = [token.kind for token in tokens[end : end + 4]]
        exponent = 2 if kinds[:2] == ["power", "number"] else 4 if kinds == ["power", "open", "number", "close"] else 0
        divided = tokens[end].text == "/" and end + 1 < len(tokens) and _names_unit(tokens[end + 1])
        step = 2 if divided else 0 if touches else exponent
        if not step:
            break
        end += step
    return end


def _names_unit(token: Token) -> bool:
    word = token.text.lower()
    if token.kind != "word" or word in _CONNECTORS | _PARTICLES | _HEDGES:
        return False
    return token.text in _LETTER_UNITS if len(word) == 1 else not set(word) <= _VARIABLES and word not in _FUNCTIONS


def _starts(tokens: Sequence[Token], at: int) -> bool:
    """Whether an expression can start here; a dash between words, or after a word, is no sign."""
    token = tokens[at]
    if token.kind in ("number", "fraction", "open"):
        return True
    following = tokens[at + 1] if at + 1 < len(tokens) else None
    before = tokens[at - 1] if at else None
    if following is None or following.kind not in ("number", "fraction", "open"):
        return False
    if token.kind == "word":
        return token.text.lower() in SIGNS
    if token.text not in ("+", "-", "–"):
        return False
    if before is not None and before.end == token.start and before.kind in ("word", *_ENDS):
        return False
    leads = before is None or before.kind in ("equals", "open", "separator", "near")
    return leads or token.end == following.start


def _bound_before(tokens: Sequence[Token], at: int) -> bool:
    """Whether what stands before an expression makes it a part of a larger one, or denies it: x18, 2^18, not 18."""
    if at == 0:
        return False
    before, touches = tokens[at - 1], tokens[at - 1].end == tokens[at].start
    if before.kind in ("command", "power", "compare") or before.text == "_":
        return True
    if before.kind == "word":
        return touches or before.text.lower() in _NEGATIONS
    if before.kind in ("operator", "open") and at > 1:
        earlier = tokens[at - 2]
        bound = earlier.kind in ("number", "close", "command", "percent") or (
            earlier.kind == "word" and len(earlier.text) == 1
        )
        return bound and (before.kind == "operator" or (earlier.end == before.start and earlier.kind != "percent"))
    return touches and before.kind in ("number", "close")


def _bound_after(tokens: Sequence[Token], at: int, mathematics: bool) -> bool:
    r"""Whether what stands behind an expression makes it a part of a larger one: 3x, 2\pi, 5 + y; not 5 kg."""
    if at == len(tokens):
        return False
    token, touches = tokens[at], tokens[at - 1].end == tokens[at].start
    if token.kind in ("command", "power", "compare") or token.text == "_":
        return True
    if token.kind == "word":
        return not _is_unit(tokens, at, touches)
    if token.kind in ("open", "number") or (token.text == "!" and mathematics):
        return touches
    return token.kind == "operator" and _operand(tokens, at + 1)


def _operand(tokens: Sequence[Token], at: int) -> bool:
    """Whether an operator before this token joins it to something: a word of several letters is none."""
    if at == len(tokens):
        return False
    token = tokens[at]
    letter = token.kind == "word" and len(token.text) == 1 and token.text not in "aAI"
    return letter or token.kind in ("number", "fraction", "open", "command")


def _is_unit(tokens: Sequence[Token], at: int, touches: bool) -> bool:
    """Whether a word behind a number is a unit or plain text, and no variable or function."""
    word = tokens[at].text
    following = tokens[at + 1] if at + 1 < len(tokens) else None
    if not word.isalpha():
        return "/" in word or "^" in word or "'" in word
    if len(word) > 1:
        variables = len(word) < 4 and set(word) <= (_VARIABLES if touches else _UNKNOWNS)
        return not variables and word.lower() not in _FUNCTIONS
    if not touches and word in "aAI":
        return True
    if word not in _LETTER_UNITS:
        return False
    if following is None:
        return True
    adjoins = tokens[at].end == following.start
    if following.kind == "power":
        return not touches
    return not (following.kind == "operator" and (touches or _operand(tokens, at + 2))) and not (
        adjoins and following.kind in ("number", "open")
    )


def _chains(tokens: Sequence[Token], values: Sequence[_Value]) -> list[_Value]:
    """Values with what they are set equal to as one: the last of "5 + 13 = 18", the first of "1/3 ≈ 0.333"."""
    chains: list[_Value] = []
    for value in values:
        between = tokens[chains[-1].last : value.first] if chains else ()
        kinds = [token.kind for token in between]
        if chains and "near" in kinds:
            chains[-1] = chains[-1]._replace(last=value.last)
        elif chains and kinds and kinds[-1] == "equals" and set(kinds[:-1]) <= {"word", "equals", "open", "close"}:
            chains[-1] = value._replace(first=chains[-1].first, steps=chains[-1].steps + 1)
        else:
            chains.append(value)
    return chains


def _unrivalled(
    tokens: Sequence[Token], chains: Sequence[_Value], order: Callable[[_Value, _Value], tuple[_Value, _Value]]
) -> Fraction | None:
    """The first of the chains, unless another value is joined to it: "18 or 19", "18, 19, 20", "18:30".

    order: puts a chain and the next in the order of the text.
    """
    if not chains:
        return None
    kept = previous = chains[0]
    for other in chains[1:]:
        if not _joined(tokens, *order(previous, other)):
            break
        if other.number != kept.number:
            return None
        previous = other
    return kept.number


def _joined(tokens: Sequence[Token], left: _Value, right: _Value) -> bool:
    """Whether nothing but connectors, a unit and hedging words stand between two values."""
    between = list(tokens[left.last : right.first])
    words = [token.text.lower() for token in between if token.kind == "word"]
    if any(token.text in (".", "!") for token in between):
        return False
    if len(words) <= _MOST_HEDGING and not _HEDGES.isdisjoint(words):
        return True
    if max(left.steps, right.steps) > 1:
        return False  # steps of a calculation
    unit = ""
    if between and between[0].kind == "word" and words[0] not in _CONNECTORS | _PARTICLES:
        unit = between.pop(0).text.lower()
    if len(between) > 1 and between[-1].kind == "equals" and between[-2].kind == "word" and len(between[-2].text) == 1:
        del between[-2:]
    signs = [token.text for token in between if token.kind != "word"]
    if ("(" in signs or "[" in signs) and not _alone_in_brackets(tokens, right):
        return False
    if any(token.kind not in _JOINING and token.text.lower() not in _CONNECTORS for token in between):
        return False
    if signs in ([")"], ["]"]) or (signs == [":"] and _is_label(tokens, between[0])):
        return False
    if unit and not between:
        return right.unit != ""
    if unit and "," in signs and len(between) == signs.count(","):
        return right.unit == unit
    return True


def _alone_in_brackets(tokens: Sequence[Token], value: _Value) -> bool:
    place = value.last + (value.unit != "")
    return place < len(tokens) and tokens[place].kind == "close"


def _is_label(tokens: Sequence[Token], colon: Token) -> bool:
    """Whether a colon touches what stands before it and not what follows: "Step 2: 18"."""
    place = tokens.index(colon)
    return tokens[place - 1].end == colon.start and colon.end < tokens[place + 1].start
