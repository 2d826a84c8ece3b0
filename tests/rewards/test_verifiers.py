"""Verifiers that any task can have, rewards that add up, and a file of answers in many spellings."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from rewards.config import RewardsConfig, TaskConfig
from rewards.numbers import NumberVerifier
from rewards.sources import build_tasks
from rewards.verifiers import MathVerifier, TextVerifier, WeightedSum, with_settings
from rewards.verify import ExactInteger, RewardsError, Verifier
from rewards.worker import RewardWorker
from rollout.types import Prompt, RewardStatus
from tests.rewards.conftest import data_of
from tests.rewards.test_worker import a_group
from tests.rewards.verifiers import a_prompt

ANSWERS = Path(__file__).parents[1] / "data" / "final_answers.jsonl"
WORDS = str(Path(__file__).parents[1] / "data" / "word_problems.jsonl")


@pytest.mark.parametrize("verifier", [NumberVerifier(), MathVerifier()])
def test_final_answers_in_many_spellings(verifier: Verifier) -> None:
    """No false positive, and at most one false negative."""
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    assert len(rows) >= 40
    scored = [(row, bool(verifier.score(row["completion"], a_prompt(answer=row["gold"])))) for row in rows]
    wrong = [(row["gold"], row["completion"], said) for row, said in scored if said != row["right"]]
    print("disagreements:", wrong)
    assert not [case for case in wrong if case[2]], "a wrong answer was accepted"
    assert len(wrong) <= 1


@pytest.mark.parametrize(
    ("gold", "completion", "right"),
    [
        ("x^2 + 2x + 1", r"\boxed{(x+1)^2}", True),
        ("x^2 + 2x + 1", r"\boxed{(x-1)^2}", False),
        (r"\sqrt{8}", r"The answer is 2\sqrt{2}", True),
        (r"\frac{1}{3}", "0.333", False),
        ("5", "I thought of 5.\nBut it is 6", False),
        ("5", "", False),
        ("5", "(" * 10_000, False),
        ("5", "1" * 10_000, False),
    ],
)
def test_symbolic_equality(gold: str, completion: str, right: bool) -> None:
    assert MathVerifier().score(completion, a_prompt(answer=gold)) == float(right)


def test_text_is_compared_without_case_and_spaces() -> None:
    prompt = a_prompt(answer="New  York")
    for right in ("new york", " New York\n", "I say <answer>NEW YORK</answer>", "So the answer is New York"):
        assert TextVerifier().score(right, prompt) == 1.0
    for wrong in ("", "York", "new york city", "<answer>Boston</answer> New York"):
        assert TextVerifier().score(wrong, prompt) == 0.0


def half(completion: str, prompt: Prompt) -> float:
    """A user's own function."""
    return 0.5


def terms(*rows: dict[str, Any], **settings: Any) -> Verifier:
    task = TaskConfig.model_validate({"name": "t", "plugin": "a:B", "rewards": rows, **settings})
    return pickle.loads(pickle.dumps(with_settings(task, ExactInteger())))


def test_terms_add_up_and_the_answer_alone_says_what_is_right() -> None:
    verifier = terms(
        {"kind": "answer", "weight": 1.0},
        {"kind": "format", "weight": 0.25, "pattern": "^ "},
        {"kind": "length", "weight": -0.5, "characters": 2},
        {"kind": "tests.rewards.test_verifiers:half", "weight": 0.1},
    )
    assert isinstance(verifier, WeightedSum)
    prompt = a_prompt(answer="2")
    assert verifier.judge(" 2", prompt) == (pytest.approx(1 + 0.25 - 0.5 + 0.05), 1.0)
    assert verifier.judge("13", prompt) == (pytest.approx(-0.5 + 0.05), 0.0)
    assert verifier.judge("123", prompt) == (pytest.approx(-0.25 + 0.05), 0.0)
    assert verifier.judge("12345", prompt) == (pytest.approx(0.05), 0.0)


def test_a_worker_leaves_sums_as_they_are_and_says_what_is_right() -> None:
    verifier = terms({"kind": "answer", "weight": 0.5}, {"kind": "format", "weight": 0.2, "pattern": "[0-9]"})
    worker = RewardWorker({"task": verifier, "exact": ExactInteger()}, RewardsConfig())
    try:
        (first, second) = asyncio.run(worker.score([a_group("2", "3", "?"), a_group("2", "3", task="exact")]))
    finally:
        worker.close()
    assert [score.reward for score in first.scores] == [pytest.approx(x) for x in (0.7, 0.2, 0.0)]
    assert [score.right for score in first.scores] == [1.0, 0.0, 0.0]
    assert [score.reward for score in second.scores] == [score.right for score in second.scores] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": "maths"}, "neither number, math, integer, text nor module:function"),
        ({"rewards": [{"kind": "lenght"}]}, "'lenght' is neither answer, format, length nor module:function"),
        ({"rewards": [{"kind": "format", "pattern": "("}]}, "is no regular expression"),
        ({"columns": {"answer": "a"}}, "columns is for path or hub; plugin takes none"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig.model_validate({"name": "t", "plugin": "a:B", **settings})


def test_a_function_that_is_not_there_is_refused_before_a_run() -> None:
    task = {"name": "words", "path": WORDS, "verifier": "tests.rewards.test_verifiers:third"}
    with pytest.raises(RewardsError, match=r"task 'words': 'tests.rewards.test_verifiers:third' cannot be used"):
        build_tasks(data_of(task))


def test_time_outs_count_as_wrong_where_that_is_asked_for() -> None:
    from tests.rewards.verifiers import Obedient

    found = {}
    for how in ("mask", "zero"):
        worker = RewardWorker({"task": Obedient()}, RewardsConfig(timeout_s=0.3, on_timeout=how))
        try:
            found[how] = worker.score_groups([a_group("1", "sleep 30", "raise oops")])[0].scores
        finally:
            worker.close()
    slow = RewardWorker({"task": Obedient()}, RewardsConfig(timeout_s=0.2, on_timeout="zero"))
    try:
        scores = slow.score_groups([a_group(*[f"sleep {n}" for n in range(30, 34)], "1")])[0].scores
    finally:
        slow.close()
    assert [score.status for score in scores] == [RewardStatus.OK] * 3 + [RewardStatus.TIMEOUT] * 2, "never tried"
    late, failed = ([found[how][n] for how in ("mask", "zero")] for n in (1, 2))
    assert [score.status for score in late] == [RewardStatus.TIMEOUT, RewardStatus.OK]
    assert late[1].reward == 0.0 and "no verdict within 0.3 s" in late[1].reason
    assert [score.status for score in failed] == [RewardStatus.ERROR] * 2
