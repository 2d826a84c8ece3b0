"""Answers in words, as Roman numerals, odd or even, in a sentence, and comparisons."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.forms import FORMS, FormVerifier, number_words, roman_numeral
from tests.rewards.verifiers import a_prompt

RIGHT = {
    ("words", "seven"): ["seven", "Seven.", " SEVEN\n", "The answer is seven.", "**seven**", "<answer>seven</answer>"],
    ("words", "twenty-one"): ["twenty-one", "Twenty one", "twenty\u2011one."],
    ("words", "one hundred five"): ["one hundred and five", "A hundred and five.", "one hundred five"],
    ("words", "one thousand two hundred"): ["one thousand, two hundred", "a thousand two hundred"],
    ("words", "minus seven"): ["minus seven", "negative seven", "Minus seven."],
    ("roman", "VII"): ["VII", "vii.", "The answer is VII.", "\\boxed{VII}", "<think>5 + 2</think>\nVII"],
    ("parity", "odd"): ["odd", "Odd.", "The answer is odd."],
    ("larger", "first"): ["first", "The first.", "**First**"],
    ("larger", "equal"): ["equal", "Equal."],
    ("sentence", "The answer is 7."): ["The answer is 7.", " So, the answer is 7.\n", "The result is +7."],
}
WRONG = {
    ("words", "seven"): [
        "", "seven or eight", "seven, eight", "not seven", "7", "VII", "seventeen", "seven eight", "seven\neight",
        "seven = 7", "seven and", "minus seven", "-seven", "seven-", "seventh", "sevenseven", "eight", "<think>seven",
        "<answer></answer> seven", "Seven!", "seven?", "s e v e n", "The answer is seven or eight.", "\ud800seven",
    ],
    ("words", "twenty-one"): ["twenty\none", "twenty - one", "twenty--one", "twentyone", "twenty, one"],
    ("words", "one hundred five"): ["one hundred and", "hundred five", "one hundred and and five", "one hundred, five"],
    ("words", "one hundred"): ["one hundred and", "a hundred and", "a", "hundreds", "one hundred thousand"],
    ("roman", "VII"): ["7", "seven", "VIII", "IIX", "VI I", "VII or VIII", "V II", "\u2166", "VIIVII", "V\nII"],
    ("roman", "IV"): ["IIII", "VI", "4"],
    ("parity", "odd"): ["even", "odd or even", "not odd", "odd even", "o", "1", "Odd?", "oddly", "odd\neven"],
    ("larger", "first"): ["second", "equal", "first or second", "first second", "not the first", "1", "the", "firstly"],
    ("sentence", "The answer is 7."): [
        "7", "7.", "The answer is 7", "The answer is 8.", "The answer is 7 or 8.", "The answer is not 7.",
        "the answer is 7.", "The answer is 7. The answer is 8.", "The answer is 77.", "The answer is 7.5.",
        "The answer is seven.", "The answer is 7.\n8", "Is the answer 7.", "The answer is -7.",
    ],
}  # fmt: skip


def cases(table: dict[tuple[str, str], list[str]]) -> list[tuple[str, str, str]]:
    return [(operation, gold, text) for (operation, gold), texts in table.items() for text in texts]


@pytest.mark.parametrize(("operation", "gold", "completion"), cases(RIGHT))
def test_usual_spellings_of_the_answer_are_right(operation: str, gold: str, completion: str) -> None:
    verifier = pickle.loads(pickle.dumps(FormVerifier(operation)))
    assert verifier.score(completion, a_prompt(answer=gold)) == 1.0


@pytest.mark.parametrize(("operation", "gold", "completion"), cases(WRONG))
def test_nothing_else_is_right(operation: str, gold: str, completion: str) -> None:
    assert FormVerifier(operation).score(completion, a_prompt(answer=gold)) == 0.0


@given(st.integers(-1200, 1200), st.integers(-1200, 1200))
def test_a_form_is_right_for_its_own_integer_alone(one: int, other: int) -> None:
    for operation in ("words", "roman", "sentence"):
        gold, given_ = FORMS[operation].write(one), FORMS[operation].write(other)
        if gold is not None and given_ is not None:
            score = FormVerifier(operation).score(given_, a_prompt(answer=gold))
            assert score == (one == other), (operation, one, other)


@given(st.text(alphabet="seven VI.\n-,adohriwtu019<>\\{}", max_size=40))
def test_no_text_makes_a_form_fail(text: str) -> None:
    for operation in FORMS:
        assert FormVerifier(operation).score(text, a_prompt(answer="no such answer")) == 0.0


def test_known_numbers_are_written_as_people_write_them() -> None:
    words = {0: "zero", 13: "thirteen", 40: "forty", 99: "ninety-nine", 100: "one hundred", -5: "minus five",
             999: "nine hundred ninety-nine", 1001: "one thousand one", 40_013: "forty thousand thirteen",
             999_999: "nine hundred ninety-nine thousand nine hundred ninety-nine"}  # fmt: skip
    assert {value: number_words(value) for value in words} == words
    roman = {1: "I", 4: "IV", 9: "IX", 14: "XIV", 40: "XL", 90: "XC", 400: "CD", 1994: "MCMXCIV", 3999: "MMMCMXCIX"}
    assert {value: roman_numeral(value) for value in roman} == roman
    assert [roman_numeral(value) for value in (0, -1, 4000)] == [number_words(10**6)] * 3 == [None] * 3
    assert FORMS["larger"].write(3, 3) == "equal" and FORMS["parity"].write(-3) == "odd"
