"""Symbolic equality of two answers in LaTeX: math-verify's comparison, without evaluating text and without rounding.

latex2sympy's grammar (ANTLR) turns the text into an unevaluated tree; no text reaches sympify, parse_expr or eval.
math-verify's `parse` is not used: its second route calls parse_expr.  What is guarded here:

- A list of characters and commands is all that is read; what the grammar does not consume to the end is not read.
- Numbers are exact: a decimal becomes a fraction.
- Every power and factorial is measured before anything computes with it, so that none can be built that is too large.
- Values are compared exactly, or to hundreds of digits where roots and functions are in them; unknowns are given
  values.  math-verify rounds to 6 decimals, or to 15 digits with small differences set to 0.
- Equations are equal when one is a constant multiple of the other; math-verify solves both, which takes any time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec, module_from_spec
from typing import Any

_LONGEST = 400  # characters; parsing takes time that grows quickly
_DEEPEST = 12  # brackets within brackets
_MOST_DIGITS = 300  # of one number
_MOST_BITS = 40_000  # of a number that an expression stands for
_MOST_BITS_BESIDE_ROOTS = 2_000  # where roots or functions are in it, which take long to so many digits
_MOST_FACTORS = 3000
_LEAST_DIGITS = 100  # that values are computed to, where they are not exact
# Unknowns are set to these, exactly: what is equal for all of them is equal.
_POINTS = tuple(Fraction(top, 1_000_003) for top in (1_414_213, 2_236_067, 1_732_051, 2_645_751, 3_316_624))

_UNICODE = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
     "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "°": "", "²": "^{2}",
     "³": "^{3}", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "≈": r"\approx "}
)  # fmt: skip
_REWRITTEN = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\approx.*", ""),
        (r"(?<!\\)\$|\\[()\[\]]|\\\$|\\!|\\(?:left|right|displaystyle|limits)(?![A-Za-z])", ""),
        (r"\\(?:boxed|fbox)(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"(?<=[0-9])(?:\\[,; ]|~| )(?=[0-9]{3}(?![0-9]))", ""),
        (r"\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s", " "),
        (r"\^ ?\{? ?\\circ(?![A-Za-z]) ?\}?|\\degree(?![A-Za-z])", ""),
        (r"\\(?:text|mbox|textrm|mathrm)\{ ?(or|and) ?\}|(?<![A-Za-z\\])(or|and)(?![A-Za-z])|\\lor(?![A-Za-z])", ","),
        (r"(?: |\\text\{ ?)?(?<![A-Za-z])(?:percent|pct)(?![A-Za-z])\}?", r"\\%"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac ?([0-9]) ?([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac ?([0-9]) ?\{", r"\\frac{\1}{"),
        (r"(\\frac ?\{[^{}]*\}) ?([0-9])(?![0-9])", r"\1{\2}"),
        (r"\\sqrt ?([0-9a-z])", r"\\sqrt{\1}"),
        (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\*\*", "^"),
        (r"\^ ?\(([^()]*)\)", r"^{\1}"),
        (r"(?<![0-9A-Za-z.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})(?![0-9A-Za-z.])", r"\1 \\cdot 10^{\2}"),
        (r"(?<![0-9])\.(?=[0-9])", "0."),
        (r", ?,", ","),
    )
)
# A unit at the end: \text{ cm^2}, cm, apples; not xy, which are unknowns.
_UNIT = re.compile(
    r"(?<=[^\s,=(+*/^-]) *(?:\\(?:text|mbox|textrm|mathrm) ?\{[^{}]*\}| (?![abcnxyz]+$)[A-Za-z]{2,})(?:\^\{?[23]\}?)?$"
)
_CHARACTERS = re.compile(r"[0-9A-Za-z +\-*/^=<>()\[\]{}|,;.!%\\_&]*")
# Numbers side by side or with an index (the grammar drops it), other exponents of ten, roots of computed degree,
# towers of powers without brackets.
_REFUSED = re.compile(
    r"(?<![_0-9.])[0-9.]++ +[0-9]|[0-9][eE][0-9+]|\\sqrt ?\[(?! ?(?:[0-9]{1,2}|[a-z]) ?\])|!!|\.\."
    r"|(?<![A-Za-z_])[0-9]++ ?_|\^ ?[A-Za-z0-9] ?\^|_ ?[A-Za-z0-9] ?_"
)
_NAMES = """
    frac sqrt cdot times div pm mp pi theta alpha beta gamma delta epsilon varepsilon lambda mu nu rho sigma tau phi
    varphi omega psi chi eta zeta xi kappa Delta Omega Theta Lambda Sigma Phi Psi infty le leq ge geq lt gt ne neq in
    cup cap setminus emptyset varnothing mathbb sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp
    binom lfloor rfloor lceil rceil lbrace rbrace text mbox textbf textrm textit mathrm mathbf"""
_COMMANDS = frozenset(_NAMES.split())
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[pb]?matrix\}")
_TEXT = re.compile(r"\\(?:text(?:bf|rm|it)?|mbox|math(?:rm|bf|bb)) ?\{[^{}]*\}")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+")


def equal(gold: str, given: str) -> bool:
    """Whether two answers in LaTeX are the same number, expression, set, tuple, interval, equation or matrix.

    False for whatever cannot be read; raises nothing but MemoryError.
    """
    try:
        first, second = _tree(_clean(gold)), _tree(_clean(given))
        return bool(_engine().sympy_expr_eq(first, second, 0, 0))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the grammar raises a bare Exception, sympy and antlr4 whatever they meet
        return False


class _NotRead(ValueError):
    """The text is no expression, or a part of it is too large."""


def _clean(text: str) -> str:
    """The text as latex2sympy's grammar wants it.

    Raises:
        _NotRead: it is too long, has words in it, or characters or commands that no answer needs.
    """
    if len(text) > _LONGEST:
        raise _NotRead("too long")
    text = text.translate(_UNICODE)
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.strip(" .")
    while (shorter := _UNIT.sub("", text).rstrip()) not in ("", text):
        text = shorter
    if not text or not _CHARACTERS.fullmatch(text) or _REFUSED.search(text):
        raise _NotRead("characters that no answer needs")
    plain = _TEXT.sub(" ", _ENVIRONMENT.sub(" ", text))
    if not set(_COMMAND.findall(plain)) <= _COMMANDS:
        raise _NotRead("a command that no answer needs")
    if any(len(word) > 2 and not set(word) <= set("abcxyz") for word in _WORD.findall(_COMMAND.sub(" ", plain))):
        raise _NotRead("words: the grammar would multiply their letters")
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise _NotRead("too many brackets")
    return text


@cache
def _parser() -> type[Any]:
    """latex2sympy's converter with exact numbers, which measures what it builds and reads to the end."""
    import sympy
    from antlr4 import Token
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    class Parser(_Latex2Sympy):
        def create_parser(self, latex_str: str) -> Any:
            self.last = super().create_parser(latex_str)
            return self.last

        def parse(self, latex_str: str) -> Any:
            tree = super().parse(latex_str)
            if self.last.getCurrentToken().type != Token.EOF:
                raise _NotRead("the grammar stopped before the end")
            return tree

        def parse_number(self, text: str) -> Any:
            digits = text.replace(",", "")
            if len(digits) > _MOST_DIGITS or not _NUMBER.fullmatch(digits):
                raise _NotRead("a number that is none")
            return sympy.Rational(digits)

        def convert_postfix(self, postfix: Any) -> Any:
            return self._measured(super().convert_postfix(postfix))

        def convert_exp(self, exp: Any) -> Any:
            return self._measured(super().convert_exp(exp))

        def convert_binom(self, binom: Any) -> Any:
            top, bottom = self.convert_expr(binom.upper), self.convert_expr(binom.lower)
            return self._measured(sympy.binomial(top, bottom, evaluate=False))

        def _measured(self, tree: Any) -> Any:
            _bits(tree)
            return tree

    return Parser


def _tree(text: str) -> Any:
    """The unevaluated tree of an expression, every number in it of bounded size."""
    tree = _parser()(is_real=not _engine().should_treat_as_complex(text)).parse(text)
    _bits(tree)
    return tree


def _bits(tree: Any) -> int:
    """An upper bound of the bits of the number that a tree stands for, unknowns counting as one bit.

    Raises:
        _NotRead: it is too large.
    """
    if isinstance(tree, (list, tuple)):
        bits = sum(map(_bits, tree))
    elif tree.is_Rational if hasattr(tree, "is_Rational") else False:
        bits = int(tree.p).bit_length() + int(tree.q).bit_length()
    elif not getattr(tree, "args", ()):
        bits = 2
    else:
        bits = _bits_of_node(tree)
    if bits > _MOST_BITS:
        raise _NotRead("too large a number")
    return bits


def _bits_of_node(tree: Any) -> int:
    import sympy

    if isinstance(tree, sympy.MatrixBase):
        return sum(map(_bits, tree.flat()))
    each = [_bits(argument) for argument in tree.args]
    if isinstance(tree, sympy.Pow):
        exponent = tree.args[1]
        if exponent.free_symbols:
            return sum(each)
        largest = math.ceil(abs(Fraction(exponent.p, exponent.q))) if exponent.is_Rational else 1 << min(each[1], 20)
        return each[0] * max(1, largest)
    if isinstance(tree, (sympy.factorial, sympy.binomial)) and not tree.args[0].free_symbols:
        largest = abs(int(tree.args[0])) if tree.args[0].is_Rational else 1 << min(each[0], 20)
        return largest * largest.bit_length() + 1
    if isinstance(tree, (sympy.exp, sympy.sinh, sympy.cosh, sympy.tanh)) and not tree.free_symbols:
        return 1 << min(each[0], 20)
    return sum(each) + 1


@cache
def _engine() -> Any:
    """A copy of math-verify's grader, for this module alone, with the comparisons that round replaced."""
    found = find_spec("math_verify.grader")
    assert found is not None and found.loader is not None
    grader = module_from_spec(found)
    found.loader.exec_module(grader)
    changed: Any = grader
    changed.sympy_numeric_eq = lambda one, other, rounding, precision: _same(one, other)
    changed.sympy_symbolic_eq = lambda one, other: False
    changed.sympy_solve_and_compare = lambda one, other, rounding, precision: _proportional(one, other)
    changed.unwrap_fcs = _linear
    return changed


def _linear(relation: Any) -> Any:
    """A relation that may be solved for its set: others take any time."""
    import sympy

    sides = [side for part in sympy.preorder_traversal(relation) if part.is_Relational for side in part.args]
    if len(relation.free_symbols) != 1 or not all(side.is_Rational or side.is_Symbol for side in sides):
        raise _NotRead("not to be solved")
    return relation


def _same(one: Any, other: Any) -> bool:
    """Whether two trees have the same value, whatever the values of their unknowns."""
    import sympy

    if isinstance(one, sympy.MatrixBase) or isinstance(other, sympy.MatrixBase):
        shapes = getattr(one, "shape", None), getattr(other, "shape", None)
        return shapes[0] == shapes[1] and all(map(_same, one.flat(), other.flat()))
    return all(_close(first, second, digits) for first, second, digits in _at_points(one, other))


def _proportional(one: Any, other: Any) -> bool:
    """Whether one equation or inequality is a constant multiple of the other."""
    engine = _engine()
    turned = engine.INVERSE_RELATIONS.get(type(one)) is type(other) and type(one) is not type(other)
    if type(one) is not type(other) and not turned:
        return False
    points = list(_at_points(one.lhs - one.rhs, other.lhs - other.rhs))
    ratios = [_divided(first, second) for first, second, _ in points]
    constant = all(_close(ratio, ratios[0], digits) for ratio, (_, _, digits) in zip(ratios, points, strict=True))
    if type(one) is engine.Eq or not constant:
        return constant and ratios[0] != 0
    first = ratios[0]
    return bool(getattr(first, "imag", 0) == 0 and (first < 0 if turned else first > 0))


def _at_points(one: Any, other: Any) -> Iterator[tuple[Any, Any, int]]:
    """The values of two trees with their unknowns set to several numbers, and how many digits were computed."""
    import mpmath

    names = sorted({symbol.name for symbol in one.free_symbols | other.free_symbols})
    bits = max(_bits(one), _bits(other))
    if bits > _MOST_BITS_BESIDE_ROOTS and not (_is_rational(one) and _is_rational(other)):
        raise _NotRead("too large a number beside roots or functions")
    digits = _LEAST_DIGITS + 2 * bits * 3 // 10
    with mpmath.workdps(digits):
        for shift in range(len(_POINTS) - 1 if names else 1):
            values = {name: _unknown(place, shift) for place, name in enumerate(names)}
            yield _value(one, values), _value(other, values), digits


def _unknown(place: int, shift: int) -> Fraction:
    """A value of the unknown at a place of the alphabet; negative in one of the rounds."""
    return _POINTS[(place + shift) % len(_POINTS)] * (1 + place // len(_POINTS)) * (-1) ** (shift == 1)


def _is_rational(tree: Any) -> bool:
    """Whether the value is rational for rational unknowns."""
    if type(tree).__name__ == "Pow" and not tree.args[1].is_Integer:
        return False
    named = tree.is_Rational or tree.is_Symbol or type(tree).__name__ in _EXACT
    return named and all(map(_is_rational, tree.args))


def _close(one: Any, other: Any, digits: int) -> bool:
    """Exactly equal, or to half of the digits where roots and functions are in it."""
    import mpmath

    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    first, second = _real(one), _real(other)
    return bool(abs(first - second) <= mpmath.mpf(10) ** -(digits // 2) * max(1, abs(first), abs(second)))


def _real(value: Any) -> Any:
    import mpmath

    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _divided(one: Any, other: Any) -> Any:
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one / other
    return _real(one) / _real(other)


def _value(tree: Any, unknowns: Mapping[str, Any]) -> Any:
    """The value of a tree: a Fraction where it is rational by construction, else an mpmath number.

    Raises:
        _NotRead: a node that is none of the list.
        ArithmeticError: no value there.
    """
    if tree.is_Rational:
        return Fraction(int(tree.p), int(tree.q))
    if tree.is_Symbol:
        return unknowns[tree.name]
    import mpmath

    name = type(tree).__name__
    if name in _CONSTANTS:
        return getattr(mpmath, _CONSTANTS[name]) if name != "ImaginaryUnit" else mpmath.mpc(0, 1)
    arguments = [_value(argument, unknowns) for argument in tree.args]
    if name in _EXACT:
        return _EXACT[name](arguments)
    if name in _FUNCTIONS:
        return getattr(mpmath, _FUNCTIONS[name])(*map(_real, arguments))
    raise _NotRead(f"{name} is none of the functions that answers need")


def _added(terms: Sequence[Any]) -> Any:
    total: Any = Fraction(0)
    for term in terms:
        exact = isinstance(total, Fraction) and isinstance(term, Fraction)
        total = total + term if exact else _real(total) + _real(term)
    return total


def _multiplied(factors: Sequence[Any]) -> Any:
    total: Any = Fraction(1)
    for factor in factors:
        exact = isinstance(total, Fraction) and isinstance(factor, Fraction)
        total = total * factor if exact else _real(total) * _real(factor)
    return total


def _raised(arguments: Sequence[Any]) -> Any:
    import mpmath

    base, exponent = arguments
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return base ** int(exponent)
    if abs(_real(exponent)) > _MOST_BITS:
        raise _NotRead("too large a power")
    return mpmath.power(_real(base), _real(exponent))


def _factorial(arguments: Sequence[Any]) -> Any:
    (value,) = arguments
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= _MOST_FACTORS:
        raise _NotRead("a factorial of no small natural number")
    return Fraction(math.factorial(int(value)))


def _binomial(arguments: Sequence[Any]) -> Any:
    whole = [int(value) for value in arguments if isinstance(value, Fraction) and value.denominator == 1]
    if len(whole) != 2 or not 0 <= whole[1] <= whole[0] <= _MOST_FACTORS:
        raise _NotRead("a binomial of no small natural numbers")
    return Fraction(math.comb(*whole))


_CONSTANTS = {"Pi": "pi", "Exp1": "e", "ImaginaryUnit": "j"}
_EXACT: dict[str, Callable[[Sequence[Any]], Any]] = {
    "Add": _added,
    "Mul": _multiplied,
    "Pow": _raised,
    "factorial": _factorial,
    "binomial": _binomial,
    "UnevaluatedExpr": lambda arguments: arguments[0],
    "Abs": lambda arguments: abs(arguments[0]),
}
_FUNCTIONS = {
    name: name
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log")
} | {"floor": "floor", "ceiling": "ceil"}
