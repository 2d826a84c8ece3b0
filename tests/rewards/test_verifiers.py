"""Verifiers that any task can have, rewards that add up, and a file of answers in many spellings."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewards.config import RewardsConfig, TaskConfig
from rewards.numbers import NumberVerifier
from rewards.sources import build_tasks
from rewards.verifiers import MathVerifier, TextVerifier, WeightedSum, with_settings
from rewards.verify import ExactInteger, RewardsError, Verifier
from rewards.worker import RewardWorker
from rollout.types import Message, Prompt, RewardStatus
from tests.rewards.conftest import data_of
from tests.rewards.test_worker import a_group
from tests.rewards.verifiers import a_prompt

ANSWERS = Path(__file__).parents[1] / "data" / "final_answers.jsonl"
WORDS = str(Path(__file__).parents[1] / "data" / "word_problems.jsonl")


VERIFIERS: dict[str, Verifier] = {"number": NumberVerifier(), "math": MathVerifier(), "text": TextVerifier()}


def test_final_answers_in_many_spellings() -> None:
    """The rules of docs/tasks.md, row by row, with no disagreement."""
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    assert len(rows) >= 200 and sum(not row["right"] for row in rows) * 2 >= len(rows)
    wrong = []
    for row in rows:
        prompt = templated(row["gold"], row.get("template", "{question}"))
        said = {name: VERIFIERS[name].score(row["completion"], prompt) for name in row["verifier"]}
        wrong += [(name, score, row) for name, score in said.items() if score != float(row["right"])]
    assert not wrong


def templated(gold: str, template: str = "{question}") -> Prompt:
    question = "How many?"
    message = Message(role="user", content=template.replace("{question}", question))
    return Prompt(ordinal=0, task="task", messages=(message,), answer=gold, payload={"question": question})


@pytest.mark.parametrize(
    ("template", "marker", "cut"),
    [
        ("{question}", "How many?", False),
        ("Q: {question}\nA:", "Q:", True),
        ("Solve this.\n### Problem\n{question}", "### Problem", True),
        ("The {question}", "The", False),  # would be found in any answer
        ("### {question}", "###", False),
        ("{question}\nAnswer:", "Answer:", False),
    ],
)
def test_another_question_begins_at_the_template_s_own_marker(template: str, marker: str, cut: bool) -> None:
    run_on = f"#### 18\n{marker} next\n#### 7"
    assert TextVerifier().score(run_on, templated("18", template)) == float(cut)
    assert NumberVerifier().score(run_on, templated("7", template)) == float(not cut)


@given(st.text(min_size=1).filter(str.strip))
@example("*")
@example("<think>")
@example("\\boxed{}")
@settings(max_examples=50, deadline=None)
def test_the_gold_answer_itself_is_right(gold: str) -> None:
    for verifier in VERIFIERS.values():
        assert verifier.score(f" {gold}\n", a_prompt(answer=gold)) == 1.0


NOISE = st.lists(
    st.sampled_from(
        ["<answer>", "</answer>", "<think>", "</think>", "\\boxed{", "\\frac", "{", "}", "(", ")", "####", "answer is ",
         "18", "1,000", ".5", "e9", "^", "**", "/", "-", "=", "≈", " or ", "x", "\\sqrt", "!", "%", "$", "\n", " ", "½",
         "³"]
    ),
    max_size=12,
)  # fmt: skip


@given(NOISE, st.sampled_from(["18", "1/2", "x^2", "1, 2", "Paris"]))
@settings(max_examples=150, deadline=None)
def test_no_text_makes_a_verifier_raise(pieces: list[str], gold: str) -> None:
    for verifier in VERIFIERS.values():
        assert verifier.score("".join(pieces), a_prompt(answer=gold)) in (0.0, 1.0)


REPEATED = (
    "<answer>", "</answer>", "<answer>1</answer>", "<think>", "</think>", "\n", "\r", " ", "#### ", "answer is ",
    "answer ", "answer is\n", "\\boxed{", "\\boxed{1}", "\\fbox{1} ", "{", "}", "\\frac{", "\\text{", "1 ", "1,", "1",
    "1/", "1.", "9e9 ", "- ", "=1", "or 1 ", "^", "(", "\\", "\\[", "$", "*", "_", "`", "**1** ", "'", "<", "<a", "<<",
    "½", "\u2009", "Question: ", "\nQuestion: ", "\nQ: 1", "Q:", "a", "not ", "<b>", "answer is $",
)  # fmt: skip


def test_time_grows_at_most_linearly_up_to_100_000_characters() -> None:
    """Four times the text takes at most eight times as long; quadratic patterns take sixteen times."""
    prompt = templated("42", "Q: {question}\nA:")
    for piece, verifier in itertools.product(REPEATED, VERIFIERS.values()):

        def seconds(length: int, piece: str = piece, verifier: Verifier = verifier) -> float:
            text = (piece * (length // len(piece) + 1))[:length] + "x"
            start = time.process_time()
            verifier.score(text, prompt)
            return time.process_time() - start

        for attempt in range(5):
            if seconds(100_000) <= 8 * seconds(25_000) + 0.01:
                break
            assert attempt < 4, f"{piece!r} * n takes {type(verifier).__name__} more than linear time"


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
        ("x", "x^{9^{9^{9}}}", False),
        ("1", "e^{9^{9}}", False),
        ("1", r"((9^{999})^{999})^{999}", False),
        ("(0, 1)", r"(0, 9^{999999999})", False),
        (r"\sqrt{2}\cdot 10^{40}", r"\sqrt{2}\cdot 10^{40} + 1", False),
        ("x^2 > 4", "(2, \\infty)", False),
        ("x = 1, y = 2", "y = 2, x = 1", True),
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


def test_no_answer_is_evaluated_as_python() -> None:
    """No code is compiled or run on behalf of an answer: the interpreter's own audit events say so."""
    script = """
import sys
from rewards.verifiers import MathVerifier, NumberVerifier, TextVerifier
from tests.rewards.verifiers import a_prompt
verifiers = MathVerifier(), NumberVerifier(), TextVerifier()
answers = ["(x+1)^2", "2x = 4", "x < 3", "1, 2", "[0, 1]", "\\\\sqrt{2}", "3!", "0.5", "28%", "2**3", "1/2",
           "(1+1)*3/2", "__import__('os').system('true')", "\\\\boxed{__import__('os').getpid()}",
           "[].__class__", "9**9**9**9", "x.y"]
golds = ["x^2 + 2x + 1", "1,2", "18", "x=2", "x<3", "\\\\{1, 2\\\\}", "x^2+1 > 0"]
seen = []
def score() -> None:
    for answer in answers:
        for gold in golds:
            for verifier in verifiers:
                verifier.score(answer, a_prompt(answer=gold))
score()
sys.addaudithook(lambda event, details: seen.append(event))
score()
watched = {"compile", "exec", "import", "open", "os.system", "subprocess.Popen", "socket.connect"}
print(sorted(watched & set(seen)))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("answer", "verifier", "message"),
    [
        ("1e30000000", None, "row 1 of .*: answer '1e30000000' is no number"),
        ("9" * 2000, "number", r"row 1 of .*: answer '9{80}…' is no number"),
        (" ", "text", "row 1 of .*: verifier text does not take the answer '' itself for right"),
        ("", "math", "row 1 of .*: verifier math does not take the answer '' itself for right"),
    ],
)
def test_gold_answers_that_no_completion_could_match_are_refused(
    answer: str, verifier: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"How many? {n}", "answer": gold} for n, gold in enumerate(("5", answer))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RewardsError, match=message):
        build_tasks(data_of({"name": "rows", "path": str(path), "verifier": verifier}))


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
