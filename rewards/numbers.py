"""The number that a completion states as its answer, and whether it is the right one.

Numbers are exact fractions of bounded size.  A text is cut into tokens, every arithmetic expression in it becomes one
`_Value`, and one of the values is the answer.  docs/tasks.md, "How an answer is read", has the rules in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from rewards.answers import marked_part, stated_text
from rollout.types import Prompt

_LONGEST_PART = 2000  # characters that are read of the part that holds the answer
_MOST_DIGITS = 1000  # of one number; an answer that goes on for longer is none
_MOST_BITS = 10_000  # of a numerator or denominator
_MOST_EXPONENT = 1000
_DEEPEST = 20  # brackets within brackets
_NESTED = 4  # commands for fonts within each other

_GROUP = "\u2009"  # stands for every space that LaTeX or Unicode has for groups of digits
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_FRACTIONS = {
    "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5",
    "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\ufe63\uff0d", "-")
    | dict.fromkeys("×·⋅∙✕", "*")
    | dict.fromkeys("÷⁄∕", "/")
    | dict.fromkeys("\u00a0\u2007\u2008\u202f\u2009\u2005\u2006", _GROUP)
    | dict.fromkeys("’ʼ", "'")
    | dict.fromkeys("→⇒⟹", " so ")
    | {
        "≈": "≈",
        "…": "...",
        "：": ":",
        "，": ", ",
        "；": ";",
        "。": ". ",
        "＝": "=",
        "％": "%",
        "＄": "",
        "°": " degrees ",
    }
    | {character: f" {fraction} " for character, fraction in _FRACTIONS.items()}
)
_LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\!|\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", _GROUP),
        (r"\\\\|\\[()\[\]]", " "),
        (r"\\([$%#&_])", r"\1"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\^ ?\{? ?\\circ(?![A-Za-z]) ?\}?|\\degree(?![A-Za-z])", " degrees "),
        (r"\\(?:Rightarrow|rightarrow|implies|to|therefore)(?![A-Za-z])", " so "),
        (r"\\approx(?![A-Za-z])", "≈"),
        (r"\\(?:le|leq|ge|geq|ne|neq|lt|gt)(?![A-Za-z])", "<"),
    )
)  # fmt: skip
_WRAPPING = (
    r"\\(?:boxed|fbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|emph|bm|boldsymbol)(?![A-Za-z])"
)
_WRAPPED = re.compile(_WRAPPING + r"[ ]?\{([^{}]*)\}")
_UNMATCHED = re.compile(_WRAPPING)
_ANNOTATION = re.compile(r"<<[^<>]{0,200}>>|</?[A-Za-z][^<>]{0,40}>")  # GSM8K's calculator notes, tags
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_BOLD = re.compile(r"(?<![0-9)}])\*\*|\*\*(?![0-9(\-])")

_TOKEN = re.compile(
    rf"""
    (?P<number>(?:[0-9]{{1,3}}(?P<mark>[,'\ {_GROUP}])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*+(?![0-9])|[0-9]++)
               (?:\.[0-9]++)?|\.[0-9]++)
    (?P<exponent>[eE][+-]?[0-9]++)?
  | (?P<fraction>\\frac(?![A-Za-z]))
  | (?P<command>\\[A-Za-z]++)
  | (?P<word>[^\W\d_]++(?:'[a-z]{{1,2}})?)
  | (?P<power>\*\*|\^)
  | (?P<operator>[-+*/])
  | (?P<equals>=)
  | (?P<open>[(\[{{])
  | (?P<close>[)\]}}])
  | (?P<percent>%)
  | (?P<separator>\.\.\.|[,;:|&–—?])
  | (?P<near>≈)
  | (?P<compare>[<>≤≥≠±])
  | (?P<quote>["“”'`*\#]|\s)
  | (?P<other>\S)
    """,
    re.VERBOSE,
)
_PLAIN = re.compile(r"\s*+(-?[0-9]{1,18})\.?\s*+")  # most answers, read without tokens

# One letter behind a number that is a unit; any other is a variable: 18m, 18 h; not 3x.
_LETTER_UNITS = frozenset("mgshdtlLCFKNJWVA")
_VARIABLES, _UNKNOWNS = frozenset("abcnxyz"), frozenset("xyz")
_FUNCTIONS = ("pi", "sqrt", "log", "ln", "sin", "cos", "tan", "exp")
_TIMES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SPOKEN_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "x": "*", "X": "*"}
_PERCENT = ("percent", "pct")
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
_SIGNS = ("minus", "negative", "Minus", "Negative")
_ENDS = ("number", "close", "percent")  # tokens that an expression ends with
_JOINING = ("separator", "open", "close", "percent")
_CLOSING = {"(": ")", "[": "]", "{": "}", "": ""}


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
    tokens = _tokens(part)
    chains = _chains(tokens, _values(tokens, mathematics))
    return _unrivalled(tokens, chains, lambda kept, other: (kept, other))


def _last_number(line: str, mathematics: bool) -> Fraction | None:
    if plain := _PLAIN.fullmatch(line):
        return Fraction(int(plain[1]))
    tokens = _tokens(line)
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
    tokens = _tokens(text)
    while tokens and tokens[-1].text == ".":
        tokens.pop()
    values = _values(tokens, mathematics)
    if len(values) != 1 or (values[0].first, values[0].last) != (0, len(tokens)):
        return None
    if any(second.text in ("+", "-") and first.kind in _ENDS for first, second in pairwise(tokens)):
        return None
    return values[0].number


class _Token(NamedTuple):
    """kind: the name of its group in `_TOKEN`.  start, end: its place in the text, which tells what it touches."""

    kind: str
    text: str
    start: int
    end: int


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


class _NotRead(ArithmeticError):
    """The tokens are no arithmetic expression, or one whose value is too large."""


def _last_line(text: str) -> str:
    """The last line with a digit, without what goes beyond the limit."""
    digits = "0123456789" if text.isascii() else "0123456789" + "".join(_FRACTIONS)
    last = max(text.rfind(digit) for digit in digits)
    if last < 0:
        return ""
    start = max(text.rfind("\n", 0, last), text.rfind("\r", 0, last)) + 1
    end = text.find("\n", last)
    line = text[start : len(text) if end < 0 else end]
    return line if len(line) <= _LONGEST_PART else line[-_LONGEST_PART:].partition(" ")[2]


def _tokens(text: str) -> list[_Token]:
    if "<" in text:
        text = _ANNOTATION.sub(" ", text)
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
        text = text.translate(_CHARACTERS)
    if "\\" in text or "{,}" in text or "~" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        for _ in range(_NESTED):
            text = _WRAPPED.sub(r" \1 ", text)
        text = _UNMATCHED.sub(" ", text)
    text = re.sub("[$€£¥₹]", "", text)
    if "**" in text:
        text = _BOLD.sub(" ", text)
    found = _TOKEN.finditer(text)
    tokens = [_Token(token.lastgroup or "", token[0], token.start(), token.end()) for token in found]
    return [token for token in map(_named, tokens) if token.kind != "quote"]


def _named(token: _Token) -> _Token:
    """The number with an exponent is a number, and the words for the percent sign are one."""
    if token.kind == "exponent":
        return token._replace(kind="number")
    if token.text.lower() in _PERCENT:
        return token._replace(kind="percent")
    return token


def _values(tokens: Sequence[_Token], mathematics: bool) -> list[_Value]:
    """Every arithmetic expression of the tokens, in order."""
    values = []
    at = 0
    while at < len(tokens):
        if not _starts(tokens, at):
            at += 1
            continue
        try:
            found = _Arithmetic(tokens, mathematics).sum(at)
        except _NotRead:
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
        exponent = _exponent_length(tokens, last + 1) if unit and whole else 0
        at = last + 1 + exponent if exponent else last
    return values


def _exponent_length(tokens: Sequence[_Token], at: int) -> int:
    """Number of tokens of a unit's exponent: of ^2 in 18 cm^2."""
    kinds = [token.kind for token in tokens[at : at + 4]]
    return 2 if kinds[:2] == ["power", "number"] else 4 if kinds == ["power", "open", "number", "close"] else 0


def _starts(tokens: Sequence[_Token], at: int) -> bool:
    """Whether an expression can start here; a dash between words, or after a word, is no sign."""
    token = tokens[at]
    if token.kind in ("number", "fraction", "open"):
        return True
    following = tokens[at + 1] if at + 1 < len(tokens) else None
    before = tokens[at - 1] if at else None
    if following is None or following.kind not in ("number", "fraction", "open"):
        return False
    if token.kind == "word":
        return token.text.lower() in _SIGNS
    if token.text not in ("+", "-", "–"):
        return False
    if before is not None and before.end == token.start and before.kind in ("word", *_ENDS):
        return False
    leads = before is None or before.kind in ("equals", "open", "separator", "near")
    return leads or token.end == following.start


def _bound_before(tokens: Sequence[_Token], at: int) -> bool:
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


def _bound_after(tokens: Sequence[_Token], at: int, mathematics: bool) -> bool:
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


def _operand(tokens: Sequence[_Token], at: int) -> bool:
    """Whether an operator before this token joins it to something: a word of several letters is none."""
    if at == len(tokens):
        return False
    token = tokens[at]
    letter = token.kind == "word" and len(token.text) == 1 and token.text not in "aAI"
    return letter or token.kind in ("number", "fraction", "open", "command")


def _is_unit(tokens: Sequence[_Token], at: int, touches: bool) -> bool:
    """Whether a word behind a number is a unit or plain text, and no variable or function."""
    word = tokens[at].text
    following = tokens[at + 1] if at + 1 < len(tokens) else None
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


class _Arithmetic:
    """A parser of + - * / ^, fractions and brackets, which computes as it reads.

    Each method starts at a token and returns the value and the first token behind it, or None where no such thing
    stands there.

    Raises:
        _NotRead: division by zero, a number too large to be written out, too many brackets.
    """

    def __init__(self, tokens: Sequence[_Token], mathematics: bool) -> None:
        self.tokens, self.mathematics = tokens, mathematics
        self._depth = 0

    def sum(self, at: int) -> tuple[Fraction, int] | None:
        """Terms joined by + and -."""
        found = self._product(at)
        while found is not None:
            value, at = found
            place = self._past_unit(at)
            sign = self._operator(place)
            right = self._product(place + 1) if sign in ("+", "-") else None
            if right is None:
                return found
            found = _bounded(value + right[0] if sign == "+" else value - right[0]), right[1]
        return None

    def _product(self, at: int) -> tuple[Fraction, int] | None:
        found = self._factor(at)
        while found is not None:
            value, at = found
            place = self._past_unit(at)
            sign = self._operator(place)
            right = self._factor(place + 1) if sign in ("*", "/") else None
            if right is None:
                return found
            if sign == "/" and right[0] == 0:
                raise _NotRead("division by zero")
            found = _bounded(value * right[0] if sign == "*" else value / right[0]), right[1]
        return None

    def _factor(self, at: int) -> tuple[Fraction, int] | None:
        """A number with its sign, its power and its percent sign."""
        if self._text(at) in ("-", "+", "–", *_SIGNS):
            found = self._unsigned(at + 1)
            return found and ((found[0] if self._text(at) == "+" else -found[0]), found[1])
        return self._unsigned(at)

    def _unsigned(self, at: int) -> tuple[Fraction, int] | None:
        found = self._atom(at)
        if found is None:
            return None
        value, at = found
        if self._kind(at) == "power" and (exponent := self._exponent(at + 1)):
            value, at = _power(value, exponent[0]), exponent[1]
        if self._kind(at) == "percent":
            value, at = (value / 100 if self.mathematics else value), at + 1
        return value, at

    def _exponent(self, at: int) -> tuple[Fraction, int] | None:
        if self._text(at) in ("-", "+"):
            found = self._atom(at + 1)
            return found and (-found[0] if self._text(at) == "-" else found[0], found[1])
        return self._atom(at)

    def _atom(self, at: int) -> tuple[Fraction, int] | None:
        kind = self._kind(at)
        if kind == "fraction":
            return self._fraction(at)
        if kind == "open":
            return self._group(at)
        if kind != "number":
            return None
        value, at = _literal(self.tokens[at].text), at + 1
        if self._text(at).lower() in _TIMES:
            return _bounded(value * _TIMES[self._text(at).lower()]), at + 1
        part = self._proper_part(at) if value.denominator == 1 else None
        return (value, at) if part is None else (value + part[0], part[1])

    def _proper_part(self, at: int) -> tuple[Fraction, int] | None:
        """The fraction of a mixed number, below 1: the 1/2 of 3 1/2."""
        if self._kind(at) == "fraction":
            found = self._fraction(at)
        elif [self._kind(at), self._text(at + 1), self._kind(at + 2)] == ["number", "/", "number"]:
            top, bottom = (_literal(self.tokens[place].text) for place in (at, at + 2))
            found = (top / bottom, at + 3) if bottom else None
        else:
            return None
        return found if found is not None and 0 < found[0] < 1 else None

    def _fraction(self, at: int) -> tuple[Fraction, int] | None:
        r"""\frac{a}{b}, \frac12, \frac1{2}."""
        first, digits = self._kind(at + 1), self._text(at + 1)
        if first == "number" and re.fullmatch("[0-9]{2}", digits):
            top, bottom, at = Fraction(int(digits[0])), Fraction(int(digits[1])), at + 2
        else:
            upper = self._argument(at + 1)
            lower = self._argument(upper[1]) if upper else None
            if upper is None or lower is None:
                return None
            (top, _), (bottom, at) = upper, lower
        if bottom == 0:
            raise _NotRead("division by zero")
        return _bounded(top / bottom), at

    def _argument(self, at: int) -> tuple[Fraction, int] | None:
        if self._kind(at) == "open":
            return self._group(at)
        return (Fraction(int(self._text(at))), at + 1) if re.fullmatch("[0-9]", self._text(at)) else None

    def _group(self, at: int) -> tuple[Fraction, int] | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NotRead("too many brackets")
        found = self.sum(at + 1)
        self._depth -= 1
        if found is None or self._text(found[1]) != _CLOSING[self._text(at)]:
            return None
        return found[0], found[1] + 1

    def _operator(self, at: int) -> str:
        """The operator here, also in words, if a number can follow; else the empty text."""
        text = self._text(at)
        if self._kind(at) == "operator":
            return text
        if text in _SPOKEN_OPERATORS and self._kind(at + 1) in ("number", "fraction"):
            return _SPOKEN_OPERATORS[text]
        if text == "–" and self._gap(at) and self._gap(at + 1):
            return "-"
        return ""

    def _past_unit(self, at: int) -> int:
        """Behind the unit in "5 apples + 13 apples"; elsewhere the same place."""
        unit = self._kind(at) == "word" and len(self._text(at)) > 1
        return at + (unit and self._text(at) not in _SPOKEN_OPERATORS and self._text(at + 1) in ("+", "*", "plus"))

    def _gap(self, at: int) -> bool:
        return 0 < at < len(self.tokens) and self.tokens[at - 1].end < self.tokens[at].start

    def _kind(self, at: int) -> str:
        return self.tokens[at].kind if at < len(self.tokens) else ""

    def _text(self, at: int) -> str:
        return self.tokens[at].text if at < len(self.tokens) else ""


def _literal(text: str) -> Fraction:
    if len(text) > _MOST_DIGITS:
        raise _NotRead("too many digits")
    digits, _, exponent = re.sub(f"[,' {_GROUP}]", "", text).lower().partition("e")
    value = Fraction(digits)
    if not exponent:
        return value
    if len(exponent) > 6 or abs(int(exponent)) > _MOST_EXPONENT:
        raise _NotRead("too large an exponent")
    return value * Fraction(10) ** int(exponent)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > _MOST_EXPONENT or (base == 0 and exponent <= 0):
        raise _NotRead("a power that is no fraction")
    if _bits(base) * abs(exponent) > _MOST_BITS:
        raise _NotRead("too large a power")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > _MOST_BITS:
        raise _NotRead("too large a number")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def _chains(tokens: Sequence[_Token], values: Sequence[_Value]) -> list[_Value]:
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
    tokens: Sequence[_Token], chains: Sequence[_Value], order: Callable[[_Value, _Value], tuple[_Value, _Value]]
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


def _joined(tokens: Sequence[_Token], left: _Value, right: _Value) -> bool:
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


def _alone_in_brackets(tokens: Sequence[_Token], value: _Value) -> bool:
    place = value.last + (value.unit != "")
    return place < len(tokens) and tokens[place].kind == "close"


def _is_label(tokens: Sequence[_Token], colon: _Token) -> bool:
    """Whether a colon touches what stands before it and not what follows: "Step 2: 18"."""
    place = tokens.index(colon)
    return tokens[place - 1].end == colon.start and colon.end < tokens[place + 1].start
