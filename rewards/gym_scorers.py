"""Scoring of our own for Reasoning Gym's data sets: where theirs runs the answer as Python, or calls a wrong one right.

Three tables.  `SCORERS` stand in for a data set's `score_answer`.  `FORMS` say which answers it gets to see at all:
what it would skip, hang on or count as it likes is no answer.  `COMPARISONS` say which answers are right where its
score forgives; of the others those keep their score that it does not call right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards import expressions
from rewards.verify import READING_ERRORS, Unreadable

Entry = dict[str, Any]
_NUMBER = re.compile(
    r"\s*([-+]?)\s*\$?\s*((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,1000})(?:\.[0-9]{0,1000})?|\.[0-9]{1,1000})"
    r"([eE][-+]?[0-9]{1,3})?\s*"
)


@lru_cache(maxsize=4096)
def number(text: str) -> Decimal | None:
    """The number that `text` consists of, with thousands by comma, a dollar or an exponent; None if it is none."""
    found = _NUMBER.fullmatch(text.replace("\u2212", "-"))
    return Decimal(found[1] + found[2].replace(",", "") + (found[3] or "")) if found else None


_JSON = str.maketrans({"'": '"', "(": "[", ")": "]"})


def literal(text: str) -> Any:
    """The list, number or string that `text` is, in Python's notation or JSON's; tuples are lists.

    Raises:
        ValueError: it is none.
        RecursionError: it is deep.
    """
    plain = text.translate(_JSON)  # ast.literal_eval answers some texts with a MemoryError
    try:
        return json.loads(plain)
    except ValueError:
        return json.loads(f"[{plain}]")


# --- Scorers in place of those that evaluate the answer, and of two that say nothing: to coin_flip, 0 is like every
# number that begins with a 0, and to game_of_life_halting every text is True.  What cannot be read scores lowest.


def _scored(score: Callable[[str, Entry], float], floor: float) -> Callable[[str, Entry], float]:
    def scorer(answer: str, entry: Entry) -> float:
        try:
            return score(answer, entry)
        except READING_ERRORS:
            return floor

    return scorer


def _makes(answer: str, numbers: list[int], target: int, floor: float) -> float:
    """1 for an expression that has the target's value and each of the numbers once."""
    steps = expressions.parse(answer)
    value = expressions.value(steps)
    used = [step.text for step in steps if step.kind == "number"]
    return 1.0 if value == target and sorted(used) == sorted(map(str, numbers)) else floor


def _countdown(answer: str, entry: Entry) -> float:
    return _makes(answer, entry["metadata"]["numbers"], entry["metadata"]["target"], floor=0.05)


def _puzzle24(answer: str, entry: Entry) -> float:
    return _makes(answer, entry["metadata"]["numbers"], 24, floor=0.01)


def _rows(answer: str) -> str:
    return "\n".join(" ".join(str(cell) for cell in row) for row in literal(answer))


def _listed(answer: str, written: Callable[[str], str], right: list[str], share: float) -> float:
    """1 for one of the right texts, a share of it for a list that is such a text when written out."""
    return 1.0 if answer in right else share * (written(answer) in right)


def _binary_matrix(answer: str, entry: Entry) -> float:
    return _listed(answer, _rows, [entry["answer"]], 0.1)


def _n_queens(answer: str, entry: Entry) -> float:
    return _listed(answer, _rows, entry["metadata"]["valid_answers"], 0.5)


def _spiral_matrix(answer: str, entry: Entry) -> float:
    return _listed(answer, lambda text: " ".join(map(str, literal(text))), [entry["answer"].strip()], 0.1)


def _string_insertion(answer: str, entry: Entry) -> float:
    return _listed(answer, lambda text: "".join(literal(text)), [entry["answer"]], 0.1)


def _polynomial_multiplication(answer: str, entry: Entry) -> float:
    variables = sorted(entry["metadata"]["variables"])
    given, gold = (expressions.polynomial(expressions.parse(text), variables) for text in (answer, entry["answer"]))
    return float(given == gold)


def _integration(answer: str, entry: Entry) -> float:
    asked = entry["metadata"]
    formula = expressions.parse(answer)
    return float(expressions.is_antiderivative(formula, str(asked["integrand"]), str(asked["variable"])))


_PROBABILITY = re.compile(
    r"\+?(?:[0-9]{1,300}(?:\.[0-9]{0,300})?|\.[0-9]{1,300})(?:[eE][-+]?[0-9]{1,2}|/[0-9]{1,300})?"
)


def _coin_flip(answer: str, entry: Entry) -> float:
    """1 for the probability, or for one rightly rounded to four decimals or more, and not to 0."""
    if not _PROBABILITY.fullmatch(answer):  # Fraction("1e99999999") takes minutes
        return 0.0
    given, gold = Fraction(answer), Fraction(entry["answer"].replace(",", ""))
    decimals = len(answer.partition(".")[2])
    rounded = answer.replace(".", "", 1).isdecimal() and decimals >= 4 and given == round(gold, decimals)
    return float(given == gold or (rounded and given != 0))


def _same_text(answer: str, entry: Entry) -> bool:
    return answer.casefold().split() == str(entry["answer"]).casefold().split()


SCORERS: dict[str, Callable[[str, Entry], float]] = {
    "binary_matrix": _scored(_binary_matrix, 0.0),
    "coin_flip": _scored(_coin_flip, 0.0),
    "countdown": _scored(_countdown, 0.01),
    "game_of_life_halting": lambda answer, entry: float(_same_text(answer, entry)),
    "intermediate_integration": _scored(_integration, 0.0),
    "n_queens": _scored(_n_queens, 0.0),
    "polynomial_multiplication": _scored(_polynomial_multiplication, 0.0),
    "puzzle24": _scored(_puzzle24, 0.01),
    "simple_integration": _scored(_integration, 0.0),
    "spiral_matrix": _scored(_spiral_matrix, 0.0),
    "string_insertion": _scored(_string_insertion, 0.0),
}


# --- Forms of an answer.


def _matches(pattern: str) -> Callable[[str, Entry], bool]:
    compiled = re.compile(pattern)
    return lambda answer, entry: compiled.fullmatch(answer.strip()) is not None


def _assigns_once(answer: str, entry: Entry) -> bool:
    """No letter of a cryptarithm twice: of several the last would count."""
    letters = [pair.partition("=")[0].strip() for pair in answer.split(",")]
    return len(set(letters)) == len(letters)


def _colours_vertices(answer: str, entry: Entry) -> bool:
    colours = _json(answer)
    vertices = {str(vertex) for vertex in entry["metadata"]["puzzle"]["vertices"]}
    return isinstance(colours, dict) and set(colours) == vertices and {type(c) for c in colours.values()} <= {int}


_POUR = re.compile(r"(?:fill|empty) [A-Z]|pour [A-Z]->[A-Z]")


def _pours(answer: str, entry: Entry) -> bool:
    moves = _json(answer)
    return isinstance(moves, list) and all(isinstance(m, str) and _POUR.fullmatch(m) for m in moves)


_CONNECTIVES = str.maketrans({"∧": "*", "∨": "*", "→": "*", "↔": "*", "¬": "-"})


def _is_proposition(answer: str, entry: Entry) -> bool:
    """Well formed, over the entry's variables: others would each double the time of a check."""
    if len(answer) > 500 or re.search(r"[^A-Z∧∨→↔¬()\s]", answer):
        return False
    steps = expressions.parse(answer.translate(_CONNECTIVES))
    names = {step.text for step in steps if step.kind == "name"}
    return names <= set(entry["metadata"]["variables"]) and {s.kind for s in steps} <= {"name", "*", "negative"}


FORMS: dict[str, Callable[[str, Entry], bool]] = {
    "cryptarithm": _assigns_once,
    "fraction_simplification": _matches(
        r"\$*\s*(?:\\d?frac\s*\{\s*[0-9]+\s*\}\s*\{\s*[0-9]+\s*\}|[0-9]+\s*/\s*[0-9]+)\s*\$*"
    ),
    "graph_color": _colours_vertices,
    "jugs": _pours,
    "kakurasu": _matches(r"[01\s,\[\]]+"),
    "prime_factorization": _matches(r"[0-9]{1,300}(?:\s*×\s*[0-9]{1,300})*"),
    "propositional_logic": _is_proposition,
    "quantum_lock": _matches(r"[A-Ca-c](?:[\s→>,-]*[A-Ca-c])*"),
    "rubiks_cube": _matches(r"(?:[LRDUBFXYZMES]w?'?[0-9]?(?:\s+|$)){1,1000}"),
    "rush_hour": _matches(r"(?:[A-Z][-+][0-9](?:[\s,]+|$)){1,1000}"),
    "sokoban": _matches(r"[UDLR\s]+"),
    "survo": _matches(r"[-+0-9\s]+"),
    "tower_of_hanoi": _matches(r"(?:Move disk [0-9]{1,4} from Peg [0-9]{1,4} to Peg [0-9]{1,4}\s*){1,5000}"),
}


# --- Comparisons with the gold answer.


def _json(text: str) -> Any:
    """As `json.loads`, but 1.0 is 1."""

    def whole(digits: str) -> float:
        given = float(digits)
        return int(given) if given.is_integer() else given

    return json.loads(text, parse_float=whole)


def _same_json(answer: str, entry: Entry) -> bool:
    """Equal also in kind: to Python, true is 1."""
    given, gold = (json.dumps(_json(text), sort_keys=True) for text in (answer, entry["answer"]))
    return given == gold


def _same_number(answer: str, entry: Entry) -> bool:
    given = number(answer)
    return given is not None and given == number(entry["answer"])


def _same_number_or_text(answer: str, entry: Entry) -> bool:
    return _same_number(answer, entry) or answer.strip() == entry["answer"]


def _same_letters(answer: str, entry: Entry) -> bool:
    return "".join(answer.casefold().split()) == "".join(entry["answer"].casefold().split())


def _same_rows(answer: str, entry: Entry) -> bool:
    given, gold = (["".join(line.split()) for line in text.strip().split("\n")] for text in (answer, entry["answer"]))
    return given == gold


def _near(answer: str, gold: float | Decimal | Fraction, tolerance: str) -> bool:
    given = number(answer)
    return given is not None and abs(Fraction(given) - Fraction(gold)) <= Fraction(tolerance)


def _same_solutions(answer: str, entry: Entry) -> bool:
    """All real solutions, each to four decimals; no text at all where there are none."""
    gold = [part for part in entry["answer"].split(",") if part.strip()]
    if not gold:
        return answer.strip() in ("", '""', "''")
    given = answer.split(",")
    return len(given) == len(gold) and all(
        _near(one, Fraction(other.strip()), "0.00006")
        for one, other in zip(sorted(given, key=_key), sorted(gold, key=_key), strict=True)
    )


def _key(text: str) -> Decimal:
    found = number(text)
    if found is None:
        raise Unreadable("not a number")
    return found


def _same_pool(answer: str, entry: Entry) -> bool:
    """All cells, to two decimals: half a unit of the last, and what a float leaves of it."""
    given, gold = ([line.split() for line in text.strip().split("\n")] for text in (answer, entry["answer"]))
    return [len(row) for row in given] == [len(row) for row in gold] and all(
        _near(one, Fraction(other), "0.005001")
        for row, right in zip(given, gold, strict=True)
        for one, other in zip(row, right, strict=True)
    )


def _same_triangle(answer: str, entry: Entry) -> bool:
    """A number, with or without its degree sign, or two in parentheses; to three decimals, angles to two."""
    pair = re.fullmatch(r"\(?([^,()]*),([^,()]*)\)?", answer.strip())
    given = list(pair.groups()) if pair else [answer.strip().rstrip("°")]
    gold = entry["answer"].strip("()°").split(",")
    if entry["metadata"]["task_type"] == "incircle_radius":
        return _same_number(answer, entry)
    return len(given) == len(gold) and all(
        _near(one, Fraction(other.strip()), "0.0005" if pair else "0.005")
        for one, other in zip(given, gold, strict=True)
    )


def _same_order(answer: str, entry: Entry) -> bool:
    given, gold = (json.loads(text.replace("'", '"')) for text in (answer, entry["answer"]))
    return [_key(str(one)) for one in given] == [_key(str(one)) for one in gold]


def _same_words(answer: str, entry: Entry) -> bool:
    return [word.strip() for word in answer.split(",")] == list(entry["metadata"]["sorted_words"])


_IS = re.compile(r"([\w'-]+)(?:\s*:|\s+is\b)?\s+(?:an?\s+)?([\w-]+)")


def _roles(text: str) -> dict[str, str]:
    """Who is what, nobody twice, and nothing else said."""
    parts = [part for part in re.split(r"[,.;\n]|\band\b", text.casefold()) if part.strip()]
    found = [_IS.fullmatch(part.strip()) for part in parts]
    roles = {one[1]: one[2] for one in found if one}
    if len(roles) != len(parts):
        raise Unreadable("not one role for everybody")
    return roles


def _same_roles(answer: str, entry: Entry) -> bool:
    return _roles(answer) == _roles(entry["answer"])


_DURATION = re.compile(
    r"(?:([-+]?[0-9]{1,9})\s*days?)?\s*,?\s*(?:([0-9]{1,3}):([0-9]{2})(?::([0-9]{2}(?:\.[0-9]{1,6})?))?)?"
)


def _seconds(text: str) -> Decimal:
    found = _DURATION.fullmatch(text.strip())
    if not found or not text.strip():
        raise Unreadable("no duration")
    days, hours, minutes, seconds = (Decimal(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _same_duration(answer: str, entry: Entry) -> bool:
    days = re.fullmatch(r"[-+]?[0-9]{1,9}", answer.strip())
    return _seconds(answer + " days" if days else answer) == _seconds(entry["answer"])


COMPARISONS: dict[str, Callable[[str, Entry], bool]] = {
    "advanced_geometry": _same_triangle,
    "calendar_arithmetic": _same_number_or_text,
    "chain_sum": _same_number,
    "codeio": _same_json,
    "decimal_arithmetic": _same_number,
    "figlet_font": _same_letters,
    "game_of_life": _same_json,
    "gsm_symbolic": _same_number,
    "knights_knaves": _same_roles,
    "letter_jumble": _same_text,
    "modulo_grid": _same_rows,
    "number_format": lambda answer, entry: _near(answer, Fraction(entry["metadata"]["solution"]), "0.0005"),
    "number_sorting": _same_order,
    "polynomial_equations": _same_solutions,
    "pool_matrix": _same_pool,
    "products": _same_number,
    "spell_backward": _same_text,
    "time_intervals": _same_duration,
    "word_sorting": _same_words,
}


def holds(table: dict[str, Callable[[str, Entry], bool]], dataset: str, answer: str, entry: Entry) -> bool:
    """Whether the answer passes the data set's row of a table; an answer that cannot be read does not."""
    try:
        return table[dataset](answer, entry)
    except READING_ERRORS:
        return False
