"""Expressions in a model's answer, read as data: parsed, walked and counted up, never compiled or evaluated.

The grammar is Python's for numbers, names, + - * / **, signs, parentheses and calls with one argument.  Texts, powers
and arguments are limited, so that time is bounded whatever the text is.  The parser is ours, because CPython's answers
some texts of 5,000 characters with a MemoryError.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import mpmath
from sympy import QQ
from sympy.polys.rings import ring

from rewards.verify import Unreadable

T = TypeVar("T")
_MOST_CHARACTERS = 5000
_MOST_BITS = 4096  # of a power's numerator and denominator
_HIGHEST_POWER = 1000
_LARGEST = 12  # bits before the point of an argument of exp, sin and the like
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[0-9]{1,300}(?:\.[0-9]{0,300})?(?:[eE][-+]?[0-9]{1,2})?|\.[0-9]{1,300})"
    r"|(?P<name>[A-Za-z_]\w{0,30})|(?P<sign>\*\*|[-+*/()]))",
    re.ASCII,
)
_CONSTANT = re.compile(r"[A-Za-z](?:_?[0-9]{1,2})?")  # of integration
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "positive": 3, "negative": 3, "**": 4}  # -2**2 is -4


class Step(NamedTuple):
    """One step of an expression in postfix order: a number or name to push, or an operation on what was pushed.

    kind: number, name, call, positive, negative, or a binary operator.
    text: of a number or name, or the function's name.
    """

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Algebra(Generic[T]):
    """What numbers, names and operations of an expression mean.  Sums and signs are those of the values."""

    number: Callable[[str], T]
    name: Callable[[str], T]
    multiply: Callable[[T, T], T]
    divide: Callable[[T, T], T]
    power: Callable[[T, T], T]
    call: Callable[[str, T], T]


def _refuse(*_: Any) -> Any:
    raise Unreadable("the expression has a name or a function that it may not have")


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, at, end = [], 0, len(text.rstrip())
    if end > _MOST_CHARACTERS:
        raise Unreadable("an expression that is too long")
    while at < end:
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            raise Unreadable(f"no expression at character {at}")
        tokens.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    return tokens


def parse(text: str) -> list[Step]:
    """An expression in postfix order (Dijkstra's shunting yard: no recursion, linear time).

    Raises:
        Unreadable: `text` is none, or is too long.
    """
    tokens = _tokens(text)
    steps: list[Step] = []
    waiting: list[Step] = []  # operators and parentheses whose right side is not complete
    complete = False  # whether what was read could end here
    for (kind, word), (_, following) in itertools.pairwise([*tokens, ("end", "")]):
        if complete and word == ")":
            _close(steps, waiting)
        elif complete and word in _PRECEDENCE:
            level = _PRECEDENCE[word] + (word == "**")  # powers group from the right
            while waiting and _PRECEDENCE.get(waiting[-1].kind, 0) >= level:
                steps.append(waiting.pop())
            waiting.append(Step(word))
            complete = False
        elif not complete and kind == "name" and following == "(":
            waiting.append(Step("function", word))
        elif not complete and kind != "sign":
            steps.append(Step(kind, word))
            complete = True
        elif not complete and word == "(":
            called = waiting.pop() if waiting and waiting[-1].kind == "function" else Step("function")
            waiting.append(Step("(", called.text))
        elif not complete and word in "+-":
            waiting.append(Step("positive" if word == "+" else "negative"))
        else:
            raise Unreadable(f"{word!r} where none can be")
    if not complete or any(step.kind == "(" for step in waiting):
        raise Unreadable("an expression that does not end")
    return steps + waiting[::-1]


def _close(steps: list[Step], waiting: list[Step]) -> None:
    """What the last open parenthesis holds, and the call of the function before it if there is one."""
    while waiting and waiting[-1].kind != "(":
        steps.append(waiting.pop())
    if not waiting:
        raise Unreadable("a parenthesis that was not opened")
    if (opened := waiting.pop()).text:
        steps.append(Step("call", opened.text))


def interpret(steps: list[Step], algebra: Algebra[T]) -> T:
    """The value of an expression.

    Raises:
        Unreadable: something in it means nothing in this algebra, or is too large.
        ArithmeticError: a division by zero, or an overflow.
    """
    binary: dict[str, Callable[[Any, Any], Any]] = {
        "+": operator.add, "-": operator.sub, "*": algebra.multiply, "/": algebra.divide, "**": algebra.power
    }  # fmt: skip
    stack: list[Any] = []
    for step in steps:
        if step.kind == "number":
            stack.append(algebra.number(step.text))
        elif step.kind == "name":
            stack.append(algebra.name(step.text))
        elif step.kind == "call":
            stack.append(algebra.call(step.text, stack.pop()))
        elif step.kind == "negative":
            stack.append(-stack.pop())
        elif step.kind != "positive":
            right = stack.pop()
            stack.append(binary[step.kind](stack.pop(), right))
    (result,) = stack
    return result


def _exponent(number: Fraction) -> int:
    if number.denominator != 1 or abs(number) > _HIGHEST_POWER:
        raise Unreadable("a power that is no integer, or a high one")
    return int(number)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    power = _exponent(exponent)
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(power) > _MOST_BITS:
        raise Unreadable("a power that is too large")
    return base**power


_ARITHMETIC = Algebra(Fraction, _refuse, operator.mul, operator.truediv, _power, _refuse)


def value(steps: list[Step]) -> Fraction:
    """The exact value of an expression of numbers; raises as `interpret`."""
    return interpret(steps, _ARITHMETIC)


def polynomial(steps: list[Step], variables: list[str]) -> Any:
    """The expression as a polynomial over the rationals, if it is written as a sum of terms; raises as `interpret`.

    A product of two sums is refused: whoever multiplies polynomials must have done so.
    """
    _, *symbols = ring(variables or ["x"], QQ)
    known = dict(zip(variables, symbols, strict=False))
    one = symbols[0] ** 0

    def name(text: str) -> Any:
        return known[text] if text in known else _refuse()

    def multiply(left: Any, right: Any) -> Any:
        if max(len(left), len(right)) > 1 and not (left.is_ground or right.is_ground):
            raise Unreadable("a product that is not multiplied out")
        return left * right

    def constant(element: Any) -> Fraction:
        if not element.is_ground:
            raise Unreadable("a variable in a divisor or an exponent")
        found = element.coeff(1)
        return Fraction(int(found.numerator), int(found.denominator))

    def divide(left: Any, right: Any) -> Any:
        divisor = 1 / constant(right)
        return left * QQ(divisor.numerator, divisor.denominator)

    def power(base: Any, exponent: Any) -> Any:
        degree = constant(exponent)
        if base.is_ground:
            return number(_power(constant(base), degree))
        if len(base) > 1 and degree not in (0, 1):
            raise Unreadable("a power that is not multiplied out")
        coefficient = base.LC
        _power(Fraction(int(coefficient.numerator), int(coefficient.denominator)), degree)
        return base ** _exponent(degree)

    def number(written: str | Fraction) -> Any:
        exact = Fraction(written)
        return one * QQ(exact.numerator, exact.denominator)

    return interpret(steps, Algebra(number, name, multiply, divide, power, _refuse))


_MP = mpmath.MPContext()
_MP.dps = 60
_CLOSE = _MP.mpf(10) ** -30
_ENOUGH = 4  # points at which formulas agree that are equal
_POINTS = [_MP.mpf(p) for p in ("-2.7123", "-0.8317", "-0.2911", "-0.1739", "0.1173", "0.2391", "0.6113", "1.9731")]


class _Dual(NamedTuple):
    """A value and its derivative."""

    value: Any
    slope: Any

    def __neg__(self) -> _Dual:
        return _Dual(-self.value, -self.slope)

    def __add__(self, other: _Dual) -> _Dual:  # type: ignore[override]
        return _Dual(self.value + other.value, self.slope + other.slope)

    def __sub__(self, other: _Dual) -> _Dual:
        return _Dual(self.value - other.value, self.slope - other.slope)

    def __mul__(self, other: _Dual) -> _Dual:  # type: ignore[override]
        return _Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def __truediv__(self, other: _Dual) -> _Dual:
        ratio = self.value / other.value
        return _Dual(ratio, (self.slope - ratio * other.slope) / other.value)


def _size(number: Any) -> float:
    """Bits before the point."""
    return float(_MP.mag(number)) if number else 0.0


def _dual_power(base: _Dual, exponent: _Dual) -> _Dual:
    if abs(exponent.value) > _HIGHEST_POWER or abs(_size(base.value)) * abs(exponent.value) > _MOST_BITS:
        raise Unreadable("a power that is too large")
    power = _MP.power(base.value, exponent.value)
    slope = _MP.mpf(0)
    if base.slope:
        slope += exponent.value * _MP.power(base.value, exponent.value - 1) * base.slope
    if exponent.slope:
        slope += power * _MP.log(base.value) * exponent.slope
    return _Dual(power, slope)


@cache
def _functions() -> dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]:
    """Functions that a formula may have, and their derivatives."""
    m = _MP
    return {
        "exp": (m.exp, m.exp),
        "log": (m.log, lambda x: 1 / x),
        "ln": (m.log, lambda x: 1 / x),
        "sqrt": (m.sqrt, lambda x: 1 / (2 * m.sqrt(x))),
        "sin": (m.sin, m.cos),
        "cos": (m.cos, lambda x: -m.sin(x)),
        "tan": (m.tan, lambda x: m.sec(x) ** 2),
        "cot": (m.cot, lambda x: -(m.csc(x) ** 2)),
        "sec": (m.sec, lambda x: m.sec(x) * m.tan(x)),
        "csc": (m.csc, lambda x: -m.csc(x) * m.cot(x)),
        "asin": (m.asin, lambda x: 1 / m.sqrt(1 - x**2)),
        "acos": (m.acos, lambda x: -1 / m.sqrt(1 - x**2)),
        "atan": (m.atan, lambda x: 1 / (1 + x**2)),
        "sinh": (m.sinh, m.cosh),
        "cosh": (m.cosh, m.sinh),
        "tanh": (m.tanh, lambda x: m.sech(x) ** 2),
        "asinh": (m.asinh, lambda x: 1 / m.sqrt(1 + x**2)),
        "acosh": (m.acosh, lambda x: 1 / (m.sqrt(x - 1) * m.sqrt(x + 1))),
        "atanh": (m.atanh, lambda x: 1 / (1 - x**2)),
    }


def _dual_call(name: str, argument: _Dual) -> _Dual:
    if name not in _functions() or _size(argument.value) > _LARGEST:
        raise Unreadable(f"no function {name!r}, or a large argument")
    function, derivative = _functions()[name]
    return _Dual(
        function(argument.value), derivative(argument.value) * argument.slope if argument.slope else _MP.mpf(0)
    )


def _at(point: Any, variable: str) -> Algebra[_Dual]:
    """Formulas of one variable and their derivatives at a point; other letters are constants of some value."""
    constants = {"pi": _MP.pi, "E": _MP.e}

    def number(written: str) -> _Dual:
        return _Dual(_MP.mpf(written), _MP.mpf(0))

    def name(text: str) -> _Dual:
        if text == variable:
            return _Dual(point, _MP.mpf(1))
        if text not in constants and not _CONSTANT.fullmatch(text):
            _refuse()
        return _Dual(+constants.get(text, _MP.sqrt(2) + sum(map(ord, text)) / _MP.mpf(97)), _MP.mpf(0))

    return Algebra(number, name, operator.mul, operator.truediv, _dual_power, _dual_call)


def is_antiderivative(formula: list[Step], integrand: str, variable: str) -> bool:
    """Whether the derivative of one expression is the other.

    To 30 digits, at points at which the integrand is real (at all if it is nowhere).  Numbers decide, not
    simplification, which takes seconds, and more the longer the answer is.  Raises as `interpret`.
    """
    wanted = _values(integrand, variable)
    for point, value in wanted:
        slope = interpret(formula, _at(point, variable)).slope
        if not abs(slope - value) <= _CLOSE * (1 + abs(value)):
            return False
    return bool(wanted)


@lru_cache(maxsize=1024)
def _values(text: str, variable: str) -> list[tuple[Any, Any]]:
    """Some points, and the values of an expression there."""
    steps, found = parse(text), []
    for point in _POINTS:
        with contextlib.suppress(ArithmeticError):  # it has none there
            found.append((point, interpret(steps, _at(point, variable)).value))
    real = [(point, value) for point, value in found if not getattr(value, "imag", 0)]
    return (real or found)[:_ENOUGH]
