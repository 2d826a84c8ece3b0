"""Arithmetic in running text: tokens, and a parser that computes with exact fractions of bounded size as it reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

_MOST_DIGITS = 1000  # of one number; an answer that goes on for longer is none
_MOST_BITS = 10_000  # of a numerator or denominator
_MOST_EXPONENT = 1000
_DEEPEST = 20  # brackets within brackets
_NESTED = 4  # commands for fonts within each other
_GROUP = "\u2009"  # stands for every space that LaTeX or Unicode has for groups of digits
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
FRACTIONS = {
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
    | {character: f" {fraction} " for character, fraction in FRACTIONS.items()}
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
_TIMES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SPOKEN_OPERATORS = {"plus": "+", "minus": "-", "times": "*", "x": "*", "X": "*"}
_PERCENT = ("percent", "pct")
SIGNS = ("minus", "negative", "Minus", "Negative")
_CLOSING = {"(": ")", "[": "]", "{": "}", "": ""}


class Token(NamedTuple):
    """kind: the name of its group in `_TOKEN`.  start, end: its place in the text, which tells what it touches."""

    kind: str
    text: str
    start: int
    end: int


class NotRead(ArithmeticError):
    """The tokens are no arithmetic expression, or one whose value is too large."""


def tokens_of(text: str) -> list[Token]:
    """The tokens of a text without its markup, spaces and currency signs."""
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
    tokens = [Token(token.lastgroup or "", token[0], token.start(), token.end()) for token in found]
    return [token for token in map(_named, tokens) if token.kind != "quote"]


def _named(token: Token) -> Token:
    """The number with an exponent is a number, and the words for the percent sign are one."""
    if token.kind == "exponent":
        return token._replace(kind="number")
    if token.text.lower() in _PERCENT:
        return token._replace(kind="percent")
    return token


class Arithmetic:
    """A parser of + - * / ^, fractions and brackets, which computes as it reads.

    Each method starts at a token and returns the value and the first token behind it, or None where no such thing
    stands there.

    Raises:
        NotRead: division by zero, a number too large to be written out, too many brackets.
    """

    def __init__(self, tokens: Sequence[Token], mathematics: bool) -> None:
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
                raise NotRead("division by zero")
            found = _bounded(value * right[0] if sign == "*" else value / right[0]), right[1]
        return None

    def _factor(self, at: int) -> tuple[Fraction, int] | None:
        """A number with its sign, its power and its percent sign."""
        if self._text(at) in ("-", "+", "–", *SIGNS):
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
        if kind == "open":
            return self._group(at)
        found = self._fraction(at) if kind == "fraction" else self._literal(at) if kind == "number" else None
        if found is None or self._text(found[1]).lower() not in _TIMES:
            return found
        return _bounded(found[0] * _TIMES[self._text(found[1]).lower()]), found[1] + 1

    def _literal(self, at: int) -> tuple[Fraction, int] | None:
        """A number, a mixed number, or the fraction in front of a word such as "million"."""
        value, at = _literal(self.tokens[at].text), at + 1
        part = self._proper_part(at) if value.denominator == 1 else None
        if part is not None:
            return value + part[0], part[1]
        if [self._text(at), self._kind(at + 1)] == ["/", "number"] and self._text(at + 2).lower() in _TIMES:
            divisor = _literal(self.tokens[at + 1].text)
            return (value / divisor, at + 2) if divisor else None
        return value, at

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
            raise NotRead("division by zero")
        return _bounded(top / bottom), at

    def _argument(self, at: int) -> tuple[Fraction, int] | None:
        if self._kind(at) == "open":
            return self._group(at)
        return (Fraction(int(self._text(at))), at + 1) if re.fullmatch("[0-9]", self._text(at)) else None

    def _group(self, at: int) -> tuple[Fraction, int] | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise NotRead("too many brackets")
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
        raise NotRead("too many digits")
    digits, _, exponent = re.sub(f"[,' {_GROUP}]", "", text).lower().partition("e")
    value = Fraction(digits)
    if not exponent:
        return value
    if len(exponent) > 6 or abs(int(exponent)) > _MOST_EXPONENT:
        raise NotRead("too large an exponent")
    return value * Fraction(10) ** int(exponent)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > _MOST_EXPONENT or (base == 0 and exponent <= 0):
        raise NotRead("a power that is no fraction")
    if _bits(base) * abs(exponent) > _MOST_BITS:
        raise NotRead("too large a power")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > _MOST_BITS:
        raise NotRead("too large a number")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
