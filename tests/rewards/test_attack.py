"""The battery of `musketeers score --attack`: what is in it, and what it finds in verifiers that are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import attack
from rewards.attack import (
    CANARY,
    CONSTANTS,
    HEDGES,
    HOSTILE,
    REWORDED,
    Case,
    Hostile,
    Tally,
    battery,
    is_gold,
    known_good,
    noise,
    shown,
)
from rewards.verifiers import TextVerifier, WeightedSum
from rewards.verify import ExactInteger, Unreadable, Verifier
from rollout.types import Prompt, RewardStatus, Score
from tests.rewards.verifiers import a_prompt

SHORT = tuple(hostile for hostile in HOSTILE if len(hostile) < 2000)
TEXTS = st.text(st.characters(exclude_categories=()), max_size=200)  # half surrogate pairs too


class Witness:
    """Many answers are right, and one of them is known."""

    def score(self, completion: str, prompt: Prompt) -> float:
        if completion == "odd":
            raise Unreadable("odd")
        return float(completion.startswith("witness"))

    def known_good(self, prompt: Prompt) -> str | None:
        return f"witness {prompt.ordinal}"


def prompts(*golds: str) -> list[Prompt]:
    return [a_prompt(text=f"question {n}", answer=gold, ordinal=n) for n, gold in enumerate(golds)]


def tried(verifier: Verifier, asked: Sequence[Prompt]) -> Tally:
    """The battery without a worker."""
    tally = Tally(len(asked))
    for case in battery(asked, [known_good(verifier, prompt) for prompt in asked]):
        tally.add(case, Score(reward=float(verifier.score(case.completion, asked[case.index]))))
    return tally


@pytest.fixture(autouse=True)
def short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long ones are for real workers."""
    monkeypatch.setattr(attack, "HOSTILE", SHORT)


def test_there_are_enough_hostile_ones_of_every_kind() -> None:
    assert len(HOSTILE) >= 60 and len({hostile.name for hostile in HOSTILE}) == len(HOSTILE)
    assert len({hostile.text for hostile in HOSTILE}) == len(HOSTILE)
    assert all(len(hostile) == len(hostile.text) for hostile in HOSTILE)
    assert sum(len(hostile) >= 10_000_000 for hostile in HOSTILE) >= 2
    assert sys.getsizeof(HOSTILE) + sum(len(h.before) + len(h.unit) + len(h.after) for h in HOSTILE) < 200_000
    whole = [hostile.text for hostile in SHORT]
    for piece in (
        "\x00",
        "\ud800",
        "\u202e",
        "nan",
        "1e400",
        "{}",
        "[[]]",
        "null",
        "score_answer",
        "!!python",
        "\x1b[",
    ):
        assert any(piece in text for text in whole), piece
    assert HOSTILE[-1].name.startswith("poisoned"), "what they do must meet the wrong answers after them"


@pytest.mark.parametrize(
    "name", ["import os", "import pathlib", "in a list", "in a matrix", "in an expression", "open", "exec", "compile",
             "subclasses", "lambda", "f-string"],
)  # fmt: skip
def test_what_runs_as_code_leaves_the_canary(name: str) -> None:
    text = next(hostile.text for hostile in HOSTILE if hostile.name == name)
    run = "import os, subprocess, sys\neval(sys.argv[1])\ntry: os.wait()\nexcept ChildProcessError: pass"
    try:
        subprocess.run([sys.executable, "-c", run, text], check=True, timeout=60)
        assert CANARY.exists()
    finally:
        CANARY.unlink(missing_ok=True)


def test_a_strict_verifier_passes_and_its_refusals_are_named() -> None:
    asked = prompts("18", "19", "-4", "18")
    tally = tried(ExactInteger(), asked)
    assert tally.passed and not tally.masked
    assert tally.counts["reworded"] == {"right": 8, "wrong": 72}, "as it is and with spaces around it"
    assert {found.completion for found in tally.false_negatives if found.index == 2} == {
        form.replace("{}", "-4") for form in REWORDED
    } - {"-4", " -4\n"}
    assert tally.counts["other gold"] == {"right": 4, "wrong": 8}
    assert tally.best_constant() == ("18", 0.5)


def test_text_that_is_found_anywhere_is_a_false_positive() -> None:
    asked = prompts("Paris", "Rome")
    verifier = TextVerifier()
    credulous = type("Credulous", (), {"score": lambda self, text, prompt: float(prompt.answer in text)})()
    assert not tried(verifier, asked).false_positives
    tally = tried(credulous, asked)
    assert not tally.passed
    found = {(finding.kind, finding.completion) for finding in tally.false_positives if finding.index == 0}
    assert {("hedge", "Paris or Rome"), ("hedge", "not Paris but Rome"), ("noise", "Paris and more")} <= found
    assert tally.counts["hedge"]["right"] == 2 * len(HEDGES)
    assert not {kind for kind, _ in found} & {"constant", "other gold", "reworded"}


def test_a_constant_that_is_always_right_is_found_with_what_it_earns() -> None:
    asked = prompts("1", "2", "3", "0")
    lucky = type("Lucky", (), {"score": lambda self, text, prompt: 0.8 if text in ("42", prompt.answer) else 0.0})()
    assert tried(lucky, asked).best_constant() == ("42", pytest.approx(0.8))
    zero = type("Zero", (), {"score": lambda self, text, prompt: float(text in ("0", prompt.answer))})()
    tally = tried(zero, asked)
    assert [found.index for found in tally.false_positives if found.kind == "constant"] == [0, 1, 2]
    assert tally.best_constant() == ("0", 1.0)


def test_without_a_gold_text_a_known_good_answer_stands_in() -> None:
    asked = prompts("", "", "")
    tally = tried(WeightedSum(Witness(), ((1.0, Witness()),)), asked)
    assert tally.passed and not tally.false_negatives
    assert set(tally.counts) == {"hostile", "constant", "other gold", "echo", "known good"}
    assert tally.counts["known good"] == {"right": 3} and tally.counts["other gold"] == {"right": 9}
    assert "known good" not in tried(ExactInteger(), prompts("1")).counts


def test_every_verdict_is_counted() -> None:
    tally = Tally(1)
    case = Case("echo", "the prompt", 0, "x" * 500, False)
    for score in (
        Score(reward=1.0),
        Score(reward=1.0 - 1e-8),
        Score(reward=0.2, answer=1.0 - 1e-10),
        Score(reward=0.0, unreadable=True, reason="no list"),
        Score(reward=0.0, status=RewardStatus.TIMEOUT, reason="late"),
        Score(reward=1.0, status=RewardStatus.ERROR, reason="failed"),
    ):
        tally.add(case, score)
    assert tally.counts["echo"] == {"right": 2, "wrong": 1, "unreadable": 1, "timeout": 1, "error": 1}
    assert len(tally.false_positives) == 2 and [found.reason for found in tally.masked] == ["late", "failed"]
    assert {len(found.completion) for found in tally.masked} == {200} and tally.masked[0].characters == 500


def test_an_echo_that_ends_in_the_gold_answer_is_no_fault() -> None:
    asked = [a_prompt(text="How many are 3 times 4?", answer="4"), a_prompt(text="And 3 times 5?", answer="15")]
    echoed = [case for case in battery(asked, [None, None]) if case.kind == "echo"]
    assert [case.right for case in echoed] == [None] * 3 + [False] * 3


@pytest.mark.parametrize(
    ("text", "gold", "same"),
    [
        ("18", "18", True), ("18.0", "18", True), ("1,800", "1800", True), ("+18", "18", True), ("1/2", "0.5", True),
        (" <answer>PARIS.</answer>", "Paris", True), ("\\boxed{18}", "18", True), ("１８", "18", True),
        ("\u0661\u0668", "18", True), ("$18", "18", True), ("a  b", "a b", True), ("**x**", "x", True),
        ("18", "19", False), ("18 or 19", "18", False), ("180", "18", False), ("", "18", False), ("", "", False),
        ("-18", "18", False), ("1/0", "0", False), ("18" + " " * 1000, "18", False), ("Paris", "", False),
    ],
)  # fmt: skip
def test_what_is_the_gold_answer_itself(text: str, gold: str, same: bool) -> None:
    assert is_gold(text, gold) is same


@given(st.integers(-(10**6), 10**6).map(str) | st.decimals(-99, 99, places=2).map(str) | TEXTS)
def test_noise_says_another_thing(gold: str) -> None:
    made = noise(gold)
    assert not any(is_gold(text, gold) for text in made.values())
    if gold.lstrip("-").isdigit():
        assert len(made) >= 6


def test_ten_kinds_of_noise_on_numbers_and_texts() -> None:
    assert len({*noise("18"), *noise("Paris")}) >= 10
    assert noise("-0.5")["the other sign"] == "0.5" and "a zero behind" not in noise("0.5")
    assert noise("[1, 9]")["last character changed"] == "[1, 0]"


@given(TEXTS, st.integers(1, 80))
def test_a_stranger_s_text_is_shown_in_one_line_of_ascii(text: str, most: int) -> None:
    line = shown(text, most)
    assert line.isascii() and line.isprintable()
    assert len(line) <= 10 * most + 40
    assert (f"({len(text)} characters)" in line) == (len(text) > most)


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_a_battery_of_any_golds_has_every_form(golds: list[str]) -> None:
    asked = prompts(*golds)
    cases = list(battery(asked, [None] * len(asked)))
    assert all(case.form.isascii() and case.form.isprintable() for case in cases)
    assert {case.index for case in cases} == set(range(len(golds)))
    assert [case.kind for case in cases[: len(SHORT)]] == ["hostile"] * len(SHORT)
    for index, gold in enumerate(golds):
        mine = [case for case in cases if case.index == index]
        assert sum(case.kind == "reworded" for case in mine) == (len(REWORDED) if gold else 0)
        assert sum(case.kind == "constant" for case in mine) == len(CONSTANTS)
        wrong = [case for case in mine if case.right is False]
        assert not [case for case in wrong if case.kind != "hedge" and is_gold(case.completion, gold)]
    assert len(REWORDED) == 20


def test_hostile_ones_go_to_prompts_whose_gold_they_do_not_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack, "HOSTILE", (Hostile("ones", "1 ", 3000), Hostile("digits", "\u0663")))
    cases = [case for case in battery(prompts("1", "3"), [None, None]) if case.kind == "hostile"]
    assert [(case.index, case.right) for case in cases] == [(1, False), (0, False)]
    cases = [case for case in battery(prompts("1", "1"), [None, None]) if case.kind == "hostile"]
    assert [case.right for case in cases] == [None, False]
