"""Expressions in a model's answer, read as data: parsed, walked and counted up, never compiled or evaluated.

The grammar is Python's for numbers, names, + - * / **, signs, parentheses and calls with one argument.  Texts, powers
and arguments are limited, so that time is bounded whatever the text is.
"""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import mpmath
from sympy import QQ
from sympy.polys.rings import ring

from rewards.verify import Unreadable

T = TypeVar("T")
_MOST_CHARACTERS = 5000
_MOST_POWERS = 100  # each nests, and CPython's parser answers deep nesting with a MemoryError
_MOST_BITS = 4096  # of a power's numerator and denominator
_HIGHEST_POWER = 1000
_LARGEST = 12  # bits before the point of an argument of exp, sin and the like
_ALPHABET = re.compile(r"[\w\s.+\-*/(),]*", re.ASCII)
_WORD = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SIGNS = re.compile(r"[-+\s]{50}")


@dataclass(frozen=True, slots=True)
class Algebra(Generic[T]):
    """What numbers, names and operations of an expression mean.  Sums and signs are those of the values."""

    number: Callable[[int | float], T]
    name: Callable[[str], T]
    multiply: Callable[[T, T], T]
    divide: Callable[[T, T], T]
    power: Callable[[T, T], T]
    call: Callable[[str, T], T]


def _refuse(*_: Any) -> Any:
    raise Unreadable("the expression has a name or a function that it may not have")


def parse(text: str) -> ast.expr:
    """The tree of an expression.

    Raises:
        Unreadable: `text` is none, or is too long or too deep.
    """
    plain = " ".join(text.split())
    words = _WORD.findall(plain) if len(plain) <= _MOST_CHARACTERS and _ALPHABET.fullmatch(plain) else ["None"]
    if any(map(keyword.iskeyword, words)) or plain.count("**") > _MOST_POWERS or _SIGNS.search(plain):
        raise Unreadable("no expression, or one that is too long")
    try:
        return ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise Unreadable(f"no expression: {error}") from None


def interpret(node: ast.expr, algebra: Algebra[T]) -> T:
    """The value of a tree.

    Raises:
        Unreadable: something in it means nothing in this algebra, or is too large.
        ArithmeticError: a division by zero, or an overflow.
    """
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return algebra.number(number)
        case ast.Name(id=name):
            return algebra.name(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            signed: Any = interpret(operand, algebra)
            return -signed
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return interpret(operand, algebra)
        case ast.BinOp(left=left, op=op, right=right):
            operations: dict[type[ast.operator], Callable[[Any, Any], T]] = {
                ast.Add: operator.add, ast.Sub: operator.sub,
                ast.Mult: algebra.multiply, ast.Div: algebra.divide, ast.Pow: algebra.power,
            }  # fmt: skip
            return operations.get(type(op), _refuse)(interpret(left, algebra), interpret(right, algebra))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return algebra.call(name, interpret(argument, algebra))
    raise Unreadable(f"{type(node).__name__} is no part of an expression")


def constants(node: ast.expr) -> list[int | float]:
    """The numbers of a tree, in no order."""
    return [
        part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, int | float)
    ]


def _exponent(number: Fraction) -> int:
    if number.denominator != 1 or abs(number) > _HIGHEST_POWER:
        raise Unreadable("a power that is no integer, or a high one")
    return int(number)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    power = _exponent(exponent)
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(power) > _MOST_BITS:
        raise Unreadable("a power that is too large")
    return base**power


def _fraction(number: int | float) -> Fraction:
    """Exactly what was written, 0.1 for instance."""
    return Fraction(str(number))


_ARITHMETIC = Algebra(_fraction, _refuse, operator.mul, operator.truediv, _power, _refuse)


def value(node: ast.expr) -> Fraction:
    """The exact value of a tree of numbers; raises as `interpret`."""
    return interpret(node, _ARITHMETIC)


def polynomial(node: ast.expr, variables: list[str]) -> Any:
    """The tree as a polynomial over the rationals, if it is written as a sum of terms; raises as `interpret`.

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

    def number(written: int | float | Fraction) -> Any:
        exact = Fraction(str(written))
        return one * QQ(exact.numerator, exact.denominator)

    return interpret(node, Algebra(number, name, multiply, divide, power, _refuse))


_MP = mpmath.MPContext()
_MP.dps = 60
_CLOSE = _MP.mpf(10) ** -30
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
    """Formulas of one variable and their derivatives at a point; other single letters are constants of some value."""
    constants = {"pi": _MP.pi, "E": _MP.e}

    def number(written: int | float) -> _Dual:
        return _Dual(_MP.mpf(str(written)), _MP.mpf(0))

    def name(text: str) -> _Dual:
        if text == variable:
            return _Dual(point, _MP.mpf(1))
        if text not in constants and len(text) != 1:
            _refuse()
        return _Dual(+constants.get(text, _MP.mpf(ord(text[0])) / 97 + _MP.sqrt(2)), _MP.mpf(0))

    return Algebra(number, name, operator.mul, operator.truediv, _dual_power, _dual_call)


def is_antiderivative(formula: ast.expr, integrand: ast.expr, variable: str) -> bool:
    """Whether the derivative of one tree is the other: to 30 digits, at eight points, where the integrand is real.

    Numbers decide, not simplification, which takes seconds, and more the longer the answer is.  Raises as `interpret`.
    """
    wanted = [(point, value) for point in _POINTS for value in _values(integrand, _at(point, variable))]
    real = [(point, value) for point, value in wanted if not getattr(value, "imag", 0)]
    for point, value in real or wanted:
        slope = interpret(formula, _at(point, variable)).slope
        if not abs(slope - value) <= _CLOSE * (1 + abs(value)):
            return False
    return bool(wanted)


def _values(node: ast.expr, algebra: Algebra[_Dual]) -> Iterator[Any]:
    """The value of a tree, if it has one there."""
    try:
        yield interpret(node, algebra).value
    except ArithmeticError:
        return
