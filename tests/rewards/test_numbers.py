"""Every spelling of a final number."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.numbers import NumberVerifier, final_number, number
from tests.rewards.verifiers import a_prompt


@pytest.mark.parametrize(
    "text",
    [
        "1000",
        "1,000",
        "$1,000",
        "1000.0",
        "So 400 + 600 = 1,000.",
        "It costs $ 1,000.00 in all.",
        "2000/2",
        r"\frac{2000}{2}",
        "Steps: 7, 8.\n#### 1,000",
        "#### $1000\nThat took 3 steps.",
        r"First \boxed{3}, then \boxed{1,000}. Checked 2 times.",
        r"\boxed{\dfrac{2000}{2}}",
        r"\boxed{\text{\$}1000}",
        "The answer is 1,000 dollars.\nThere were 12 months.",
        "The final ANSWER IS: $1000.",
        r"The answer is \boxed{1000}, not 999.",
        "The answer is **1000**.",
        "The answer is not 5, the answer is 1000.",
    ],
)
def test_a_thousand_in_every_spelling(text: str) -> None:
    assert NumberVerifier().score(text, a_prompt(answer="1000")) == 1.0


@pytest.mark.parametrize(
    "text", ["", "no number", "100", "1000.5", "-1000", "#### 5\n1000", r"\boxed{5} 1000", "#### none\n1000", "1000/0"]
)
def test_what_is_not_a_thousand(text: str) -> None:
    assert NumberVerifier().score(text, a_prompt(answer="1000")) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10-3 = 7", 7),
        ("7 = 10-3", 7),
        ("it is -3", -3),
        ("it is -$3", -3),
        ("it is $-3", -3),
        ("1/3", Fraction(1, 3)),
        (".5", 0.5),
    ],
)
def test_signs_and_fractions(text: str, value: float | Fraction) -> None:
    assert final_number(text) == value


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_a_number_is_read_back_from_any_way_of_writing_it(top: int, bottom: int) -> None:
    for spelling in (f"{top}", f"{top:,}", f"{top}.0", f"#### {top:,}", f"\\boxed{{{top}}}", f"the answer is {top}."):
        assert final_number(spelling) == top, spelling
    assert number(f"{top}/{bottom}") == Fraction(top, bottom)


@given(st.text(alphabet="0123456789.,$/-\\boxedfrac{}# answer is\n", max_size=60))
def test_no_text_makes_it_raise(text: str) -> None:
    assert final_number(text) is None or isinstance(final_number(text), Fraction)


CENTS = st.integers(-10_000, 10_000).map(lambda cents: f"{cents / 100:.2f}")


@given(
    CENTS,
    st.integers(0, 10_000).map(lambda cents: f"{cents / 100:.2f}"),
    st.sampled_from([" or ", " and ", ", ", "; ", " to ", ":", " | ", " ", " or maybe ", " & ", " apples or "]),
    st.sampled_from(["#### {}", "<answer>{}</answer>", "\\boxed{{{}}}", "The answer is {}", "it is {}"]),
)
def test_different_values_side_by_side_are_no_answer(one: str, other: str, joint: str, mark: str) -> None:
    expected = Fraction(one) if Fraction(one) == Fraction(other) else None
    assert final_number(mark.format(one + joint + other)) == expected


@pytest.mark.parametrize(
    "text", ["1e30000000", "1e99999", "1e-30000000", "9" * 5000, "9^" * 300 + "9", "2^99999999", "1/0", "(" * 500]
)
def test_numbers_too_large_to_be_written_out_are_none(text: str) -> None:
    assert number(text) is None
    assert final_number(f"The answer is {text}") is None


def test_no_more_of_a_part_is_read_than_2000_characters() -> None:
    words = "word " * 300
    assert final_number(f"The answer is {words}18") == final_number(f"18 {words}") == 18
    assert final_number(f"The answer is {words * 2}18") is None is final_number(f"18 {words * 2}")


@pytest.mark.parametrize("text", ["2024-01-15", "18 or 19", "18 apples", "10-3", "1,2", "x", "", "18:30", "1.2.3"])
def test_what_is_not_one_number_is_no_gold_answer(text: str) -> None:
    assert number(text) is None
