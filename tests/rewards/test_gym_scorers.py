"""Scorers and comparisons of our own: they agree with the data sets' own on harmless answers, and only there."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import reasoning_gym
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import expressions
from rewards.gym import GymVerifier
from rewards.gym_scorers import SCORERS, number
from rewards.readings import readings
from rewards.verify import READING_ERRORS, Unreadable
from tests.rewards.gym_samples import NAMES, right_answer, samples, verdict

Entry = dict[str, Any]
ALL_KINDS = {"problem_type_weights": [1, 1, 1, 1, 1, 1, 1, 0]}  # the last one's generator takes seconds an entry


def arithmetic_answers(entry: Entry) -> Iterator[str]:
    """Right and wrong expressions, without // and leading zeros, which are refused here."""
    gold, numbers = entry["answer"], entry["metadata"]["numbers"]
    yield from (gold, f"({gold})", gold.replace(" ", ""), f"{gold}+0", f"{gold}+1", f"1*({gold})", f"-(-({gold}))")
    yield from (gold.replace("+", "-"), gold.replace("*", "+"), f"{gold} = 1", f"{gold} {gold}", "", f"2*{gold}")
    yield from (sign.join(map(str, numbers)) for sign in "+-*/")
    yield from (f"({gold})/1", f"({gold})**1", "x", f"{gold}+x", gold[:-1], gold[::-1], f"({gold}", "1/0", f"{gold}.0")
    rng = random.Random(gold)
    for _ in range(6):
        first, *rest = rng.sample(numbers, len(numbers))
        made = str(first)
        for one in rest:
            made = rng.choice(("{}+{}", "({}-{})", "{}*{}", "({})/{}", "{}-{}")).format(made, one)
        yield made


def integrals(entry: Entry) -> Iterator[str]:
    """Antiderivatives in many forms, and formulas that are none."""
    gold, integrand, x = entry["answer"], entry["metadata"]["integrand"], entry["metadata"]["variable"]
    yield from (gold, gold.replace(" + C", ""), *(gold.replace("C", constant) for constant in ("7", "c", "K", "C1")))
    yield from (
        gold.replace("+ C", "- C"),
        f"({gold})",
        gold.replace(" ", ""),
        f"2*({gold})",
        f"-({gold})",
        f"{gold}+{x}",
    )
    yield from (
        f"{gold}*{x}",
        gold.replace("x", "y").replace("X", "Y"),
        gold.replace("**", "^"),
        "",
        gold[::-1],
        gold[:-4],
    )
    yield from (f"{gold} = F", integrand, f"{integrand} + C", "0", "C", f"{gold}*C", f"{gold}+C*{x}", f"{gold}+1/2")
    yield from (f"{gold}+sin(1)+sqrt(2)+pi+E", f"({gold})/1", f"{gold}+log(2)", f"2{x}", f"{x}({x}+1)")
    yield from (gold.replace("3", "4"), gold.replace("2", "3"), gold.replace("+", "-", 1))
    symbol = sympy.Symbol(x)
    formula = sympy.parse_expr(gold, local_dict={x: symbol, "C": sympy.Symbol("C")})
    for change in (sympy.factor, sympy.expand, sympy.together, sympy.simplify):
        yield str(change(formula))
    yield str(formula + sympy.sin(symbol) ** 2 + sympy.cos(symbol) ** 2)
    yield str(formula + sympy.log(2 * symbol) - sympy.log(symbol))
    yield from (str(formula + sympy.atan(symbol)), str(formula + sympy.exp(symbol)))


def polynomials(entry: Entry) -> Iterator[str]:
    """Sums of terms, and what is not multiplied out."""
    gold, asked = entry["answer"], entry["metadata"]["polynomial_expr"]
    x = (entry["metadata"]["variables"] or ["x"])[0]
    yield from (gold, asked, f"({gold})", gold.replace(" ", ""), f"{gold}+0", f"{gold}+1", f"1*({gold})", f"-({gold})")
    yield from (f"-(-({gold}))", f"2*({gold})/2", gold.replace("**", "^"), gold.upper(), "", gold[::-1], gold[:-4])
    yield from (f"{gold}+{x}-{x}", f"{gold}+{x}", f"({gold})**1", f"({gold})**2", f"({gold})+z1", f"5+{gold}-5", "0")
    yield from (f"{x}*{x}+{gold}-{x}**2", f"({gold})*({x}+1)", gold.replace("3", "4"), gold.replace("2", "5"))
    product = sympy.parse_expr(gold)
    yield from (str(sympy.factor(product)), str(sympy.horner(product)), str(2 * product))


def lists(entry: Entry) -> Iterator[str]:
    """The text as it should be, as lists of several kinds, and other lists."""
    gold = entry["answer"]
    rows = [row.split() for row in gold.split("\n")]
    cells = [[int(cell) if cell.isdecimal() else cell for cell in row] for row in rows]
    yield from (gold, f"{gold} ", f"{gold}\n", str(cells), str(rows), str(tuple(map(tuple, rows))), repr(gold))
    yield from (
        str(list(gold)),
        str(gold.split()),
        str([cell for row in cells for cell in row]),
        "",
        "[]",
        "[[]]",
        "0",
        "None",
        gold[::-1],
    )
    yield from (gold[:-1], f"[{gold}]", ",".join(gold.split()), str(list(gold[::-1])), str(rows[::-1]), "{}", "'abc'")
    yield from ("1", "[1, 2]", '["a", "b"]', str(rows).replace("'", '"'), gold.replace(" ", ""))


SLOW = pytest.mark.slow
HARMLESS = [
    pytest.param("binary_matrix", lists, {}),
    pytest.param("countdown", arithmetic_answers, {}),
    pytest.param("intermediate_integration", integrals, ALL_KINDS, marks=SLOW),
    pytest.param("n_queens", lists, {}),
    pytest.param("polynomial_multiplication", polynomials, {}),
    pytest.param("puzzle24", arithmetic_answers, {}),
    pytest.param("simple_integration", integrals, {}, marks=SLOW),
    pytest.param("spiral_matrix", lists, {}),
    pytest.param("string_insertion", lists, {}),
]


@pytest.mark.parametrize(("name", "answers", "config"), HARMLESS)
def test_our_scorers_agree_with_the_data_sets_on_harmless_answers(
    name: str, answers: Callable[[Entry], Iterator[str]], config: dict[str, Any]
) -> None:
    theirs = reasoning_gym.create_dataset(name, seed=11, size=12, **config)
    entries = [theirs[index] for index in range(12)]
    cases = [(answer.strip(), entry) for entry in entries for answer in answers(entry)]
    cases = [case for case in cases if not re.search(r"\b0\d", case[0])]
    assert len(cases) >= 200
    own = [float(theirs.score_answer(answer, entry)) for answer, entry in cases]
    assert own.count(1.0) > len(own) / 20 and min(own) < 0.1
    scores = [SCORERS[name](answer, entry) for answer, entry in cases]
    assert [(case[0], ours, score) for case, ours, score in zip(cases, scores, own, strict=True) if ours != score] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2*3", 7), ("-2**2", -4), ("2**-1", Fraction(1, 2)), ("2**3**2", 512), ("(1 - 3)*-2", 4), ("8/4/2", 1),
        ("8 - 4 - 2", 2), ("+-+3", -3), ("-(2 + 3)**2", -25), ("2*-3**2", -18), ("0.1 + .2", Fraction(3, 10)),
        ("((7))", 7), ("1e2", 100), (" 1\n+\t1 ", 2), ("2**-2**2", Fraction(1, 16)), ("5.", 5),
    ],
)  # fmt: skip
def test_expressions_have_python_s_meaning(text: str, value: Fraction) -> None:
    assert expressions.value(expressions.parse(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "1 2", "2x", "2(3)", "(3)(4)", "1 +", "* 2", "()", "(1", "1)", "1..2", "1//2", "5!", "a b", "a.b",
        "1\x00", "²", "٣", "f()", "f(1, 2)", "[1]", "'1'", "1 if 1 else 2", "lambda: 0", "x := 1",
        "1_000", "0x10", "1j", "{}",
        "__import__('os')", "x.__class__", "print(1)(2)", "f\"{1}\"", "1 == 1", "not 1", "~1", "1 @ 2", "1;2", "a[0]",
        "1+" * 3000 + "1",
    ],
)  # fmt: skip
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(Unreadable):
        expressions.value(expressions.parse(text))


@given(st.recursive(
    st.integers(0, 30).map(str),
    lambda parts: st.tuples(
        st.sampled_from(["({} + {})", "{} - {}", "{} * {}", "({}) / ({})", "-({})", "({})**2"]), parts, parts
    ).map(lambda drawn: drawn[0].format(*drawn[1:])),
    max_leaves=8,
))  # fmt: skip
def test_expressions_agree_with_python(text: str) -> None:
    try:
        expected = eval(text, {"__builtins__": {}})  # the test's own text
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            expressions.value(expressions.parse(text))
        return
    try:
        value = expressions.value(expressions.parse(text))
    except Unreadable as error:
        assert "large" in str(error)
        return
    assert float(value) == pytest.approx(expected, rel=1e-9, abs=1e-9)


TOKENS = [
    "1",
    "23",
    "x",
    "C",
    "+",
    "-",
    "*",
    "/",
    "**",
    "(",
    ")",
    "sin(",
    "exp(",
    "sqrt(",
    "log(",
    ".5",
    " ",
    ",",
    "1.",
    "not ",
]
BOMBS = [
    "9**9**9**9", "((9**999)**999)**999", "((3*x)**1000)**1000", "exp(exp(exp(exp(x))))", "x**x**x**x", "sin(10**1000)",
    "exp(" * 900 + "x" + ")" * 900, "(" * 2500 + "1" + ")" * 2499, "-" * 4999 + "1", "2**" * 1600 + "2",
    "1+" * 2400 + "1",
    "R " * 2500, "x**-" * 1200 + "1", "1e99" * 1000, "9" * 5000, "f(" * 2400, "not " * 1200 + "1", "1/3+" * 1200 + "1",
    "x/" * 2400 + "3", "(x+1)*" * 800 + "1", "1." * 2400, "10**1000*" * 500 + "x", "9" * 100_000, "(" * 1_000_000,
]  # fmt: skip


@given(st.one_of(
    st.lists(st.sampled_from(TOKENS), max_size=200).map("".join),
    st.tuples(st.lists(st.sampled_from(TOKENS), max_size=4).map("".join), st.integers(1, 1500)).map(
        lambda drawn: (drawn[0] * drawn[1])[:5000]
    ),
    st.sampled_from(BOMBS),
))  # fmt: skip
@settings(max_examples=150)
def test_any_text_ends_in_a_value_or_a_refusal_before_long(text: str) -> None:
    """Never in a MemoryError, which would be called a failed verifier."""
    began = time.process_time()
    for meaning in (
        expressions.value,
        lambda steps: expressions.polynomial(steps, ["x", "y"]),
        lambda steps: expressions.is_antiderivative(steps, "x", "x"),
    ):
        try:
            meaning(expressions.parse(text))
        except READING_ERRORS:
            continue
    assert time.process_time() - began < 30  # a bomb takes hours


def test_formulas_are_compared_to_thirty_digits() -> None:
    def right(formula: str, integrand: str) -> bool:
        return expressions.is_antiderivative(expressions.parse(formula), integrand, "x")

    assert (
        right("x**2 + C_1", "2*x")
        and right("log(x)*x - x", "log(x)")
        and right("x*asin(3*x) + sqrt(1 - 9*x**2)/3", "asin(3*x)")
    )
    assert right("sin(x)**2/2", "sin(x)*cos(x)") and right("-cos(2*x)/4", "sin(x)*cos(x)")
    assert (
        right("E**x", "exp(x)") and right("x**x", "x**x*(log(x) + 1)") and right("-2*(-x - 9)**(3/2)/3", "sqrt(-x - 9)")
    )
    assert right("123456789012345678901*x", "123456789012345678901")
    assert not right("123456789012345678901*x", "123456789012345678902")
    assert not right("0.3333333333333333*x**3", "x**2") and right("x**3/3", "x**2")
    assert not right("x**2 + C*x", "2*x") and not right("x**2 + sqrt(-1)*x", "2*x") and not right("X**2", "2*x")


NUMBERS = [
    ("12", 12), ("+12", 12), ("012", 12), ("12.0", 12), ("1,234", 1234), ("$1,234.50", "1234.5"), ("−5", -5),
    ("5e3", 5000),
    ("15,6", None), ("1,2,3", None), ("12 and 13", None), ("not 12", None), ("12%", None), ("", None), ("1e9999", None),
    ("9" * 2000, None), ("nan", None), ("٣", None), ("1 000", None), ("--5", None), ("12.", 12), (".5", ".5"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_numbers(text: str, expected: int | str | None) -> None:
    found = number(text)
    assert found == (None if expected is None else Fraction(expected)), found


def forgiven(name: str) -> tuple[list[Any], GymVerifier]:
    prompts, verifier = samples(name, 20)
    return [(prompt, right_answer(prompt, verifier)) for prompt in prompts], verifier


# What the data sets' own scoring called right, or what made it fail; G is the gold answer.
FORGIVEN: dict[str, list[Callable[[str], str]]] = {
    "coin_flip": [lambda g: "0", lambda g: "1e400", lambda g: f"{float(g) + 0.00005}", lambda g: "-" + g],
    "gsm_symbolic": [lambda g: "-" + g, lambda g: f"not {g} but 99999", lambda g: f"[{g}]", lambda g: f"{g}, {g}1"],
    "time_intervals": [lambda g: f"{int(g.split()[0]) + 1} days" if "days" in g else "1" + g, lambda g: g + ":99"],
    "game_of_life": [lambda g: "{}", lambda g: g.replace("0", "1", 1), lambda g: g.replace("0", "2", 1), lambda g: "0"],
    "modulo_grid": [lambda g: ("❌" if g[0] == "✅" else "✅") + g[1:], lambda g: g + "0"],
    "knights_knaves": [lambda g: g + " and the opposite", lambda g: "not " + g, lambda g: f"{g} {g} not"],
    "decimal_arithmetic": [lambda g: g[:-1] + str((int(g[-1]) + 1) % 10)],
    "number_sorting": [lambda g: g.replace("'", "'", 1).replace(".0'", ".4'"), lambda g: g + ","],
    "word_sorting": [lambda g: g + ", more"],
    "spell_backward": [lambda g: g + " and more", lambda g: g + g],
    "letter_jumble": [lambda g: g + " and more"],
    "figlet_font": [lambda g: g + "xyz"],
    "boxnet": [lambda g: "0", lambda g: "[[]]", lambda g: "null", lambda g: '{"a": 1}'],
    "sokoban": [lambda g: f"The answer {g}", lambda g: g.lower()],
    "quantum_lock": [lambda g: f"not {g}", lambda g: g + " I"],
    "rush_hour": [lambda g: f"{g} A+99999999999"],
    "rubiks_cube": [lambda g: f"{g} 2x2", lambda g: "R999999999999"],
    "propositional_logic": [lambda g: " ∨ ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), lambda g: f"({g}) ∨ a"],
    "cryptarithm": [lambda g: f"{g[0]}=9,{g}"],
    "calendar_arithmetic": [lambda g: f"{g}9"],
    "products": [lambda g: f"{g[0]},{g[1:]}" if len(g) > 4 else "x"],
}  # fmt: skip


@pytest.mark.parametrize("name", FORGIVEN)
def test_what_the_data_set_forgives_is_wrong(name: str) -> None:
    cases, verifier = forgiven(name)
    for prompt, gold in cases:
        texts = [make(gold) for make in FORGIVEN[name]]
        for text in (text for text in texts if text != gold):
            assert verdict(verifier, text, prompt) <= 0.99, text


def test_a_claim_to_be_right_that_is_false_earns_nothing_and_others_keep_their_shape() -> None:
    cases, verifier = forgiven("gsm_symbolic")
    assert verifier.score(f"not {cases[0][1]}", cases[0][0]) == 0.0
    days = [(prompt, gold) for prompt, gold in forgiven("time_intervals")[0] if gold.endswith("days")]
    prompt, gold = days[0]
    assert 0.5 < forgiven("time_intervals")[1].score(f"{int(gold.split()[0]) + 10} days", prompt) < 0.99


NATURAL: dict[str, list[Callable[[str], str]]] = {
    "gsm_symbolic": [lambda g: f"${g}", lambda g: f"{float(g):,.2f}", lambda g: f"<answer>\\boxed{{{g}}}</answer>"],
    "coin_flip": [lambda g: g + "0", lambda g: str(Fraction(g)), lambda g: str(float(g))],
    "time_intervals": [lambda g: g.lstrip("0") if ":" in g and not g.startswith("00") else g],
    "game_of_life": [lambda g: g.replace(",", ", "), lambda g: g.replace("],", "],\n ")],
    "knights_knaves": [lambda g: ", ".join(reversed(g.rstrip(".").split(", and "))), lambda g: g.lower()],
    "modulo_grid": [lambda g: "\n".join(" ".join(row) for row in g.split("\n"))],
    "number_sorting": [lambda g: g.replace("'", ""), lambda g: g.replace("'", '"')],
    "chain_sum": [lambda g: f"{int(g):+,}", lambda g: g + ".0"],
    "pool_matrix": [lambda g: "\n".join(" ".join(f"{float(c):.2f}" for c in row.split()) for row in g.split("\n"))],
    "word_sorting": [lambda g: g.replace(", ", ",")],
    "countdown": [lambda g: g.replace(" ", ""), lambda g: f"({g})"],
    "simple_integration": [lambda g: g.replace(" + C", ""), lambda g: "C + " + g.removesuffix(" + C")],
    "tower_of_hanoi": [lambda g: g.replace("\n", "\n\n  ")],
}


@pytest.mark.parametrize("name", NATURAL)
def test_natural_spellings_stay_right(name: str) -> None:
    cases, verifier = forgiven(name)
    for prompt, gold in cases:
        for make in NATURAL[name]:
            assert verifier.score(make(gold), prompt) == 1.0, make(gold)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7", "7"), (" 7\n", "7"), ("<answer>7</answer>", "7"), ("<answer>6</answer> no <answer>7</answer>", "7"),
        ("<ANSWER>\n7\n</Answer> done", "7"), ("so <answer>7", "7"), ("<answer>7</answer> <answer>8", "7"),
        ("</answer>7", "</answer>7"),
        ("<answer>6<answer>7</answer>", "7"), ("<think>6</think>7", "7"), ("6</think>7", "7"),
        ("<think><answer>6</answer></think> 7", "7"),
        ("<answer>6</answer></think>\n<answer>7</answer>", "7"),
        ("<think>7", None), ("<think>6</think>7<think>8", None),
        ("", ""),
    ],
)  # fmt: skip
def test_where_the_answer_stands(completion: str, answer: str | None) -> None:
    assert next(readings(completion, "7"), None) == answer


@pytest.mark.parametrize(
    ("answer", "gold", "last"),
    [
        (r"\boxed{7}", "7", "7"), (r"It is \boxed{6}, or rather $\boxed{\text{7}}$.", "7", "7"),
        (r"\boxed{{7}", "7", r"\boxed{{7}"), ("answers", "7", "answers"),
        (r"\boxed{f\{x\}}", "7", r"f\{x\}"), ("**7**", "7", "7"), ("The answer is: **7.**", "7", "7"),
        ("Answer: 7", "7", "7"),
        ("7.", "7", "7"), ("A b.", "A b.", "A b."), ("The answer is 6. The answer is 7", "7", "7"),
        (r"\(7\)", "7", "7"),
        ("```\n7\n8\n```", "7", "7\n8"), ("**7** and **8**", "7", "7** and **8"), ("$$7$$", "7", "7"),
    ],
)  # fmt: skip
def test_markup_is_taken_off(answer: str, gold: str, last: str) -> None:
    assert list(readings(answer, gold))[-1] == last


@pytest.mark.parametrize(
    "unit", ["<answer>", "</answer>", "<think>", "\\boxed{", "answer is ", "answer ", "**", "`", "$", "{", " ", "."]
)
def test_readings_of_a_long_text_take_a_moment(unit: str) -> None:
    began = time.process_time()
    for text in (unit * 100_000, "answer" + unit * 100_000, unit * 100_000 + "x"):
        assert len(list(readings(text, "7"))) <= 9
    assert time.process_time() - began < 30  # quadratic time would take hours


def test_broken_scoring_is_no_right_answer() -> None:
    """So that a verifier whose own scoring fails on everything is found out by its known good answer."""
    (prompt, *_), verifier = samples("game_of_life", 20)
    good = verifier.known_good(prompt)
    assert good is not None and good != prompt.answer and verifier.score(good, prompt) == 1.0
    with pytest.raises(READING_ERRORS):
        verifier.score("{}", prompt)

    class Broken:
        def score_answer(self, answer: str, entry: Entry) -> float:
            raise TypeError("a change in the package")

    broken = GymVerifier("t", "game_of_life", {})
    broken._scorers[None] = Broken()
    with pytest.raises(TypeError):
        broken.score(good, prompt)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_read_or_raises_a_reading_error(name: str) -> None:
    """Nothing but that, and within seconds."""
    from tests.rewards.test_hostile import NASTY, hostile

    (prompt, *_), verifier = samples(name, 1)
    gold = right_answer(prompt, verifier) or "7"
    repeated = [
        "R9 ",
        "A+9 ",
        "1,",
        '["fill A"]',
        '{"a":',
        "P∨",
        "¬",
        "1 ",
        "[[1]]",
        "U",
        "→A",
        "a,",
        "1:",
        "Move disk 1 from Peg 1 to Peg 2\n",
    ]
    grown = [(unit * 20_000)[:19_000] for unit in [*repeated, gold, gold + "\n", gold + " "]]
    for text in [
        *NASTY,
        *BOMBS,
        *grown,
        "1e30000000",
        "A+999999999999",
        "R999999999999",
        *hostile(30, seed=name_seed(name)),
    ]:
        began = time.process_time()
        assert 0.0 <= verdict(verifier, text, prompt) <= 1.0
        assert time.process_time() - began < 30, text[:50]


def name_seed(name: str) -> int:
    return sum(map(ord, name))
