"""Hostile answers through real reward workers: every one gets a status, within the limit, and harms nothing else."""

from __future__ import annotations

import math
import random
import string
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing

import pytest
from reasoning_gym.factory import DATASETS

from rewards.attack import CANARY, EXIT_CODE, HOSTILE, Hostile
from rewards.config import DataConfig, RewardsConfig, TaskConfig
from rewards.generation import one_generator
from rewards.numbers import NumberVerifier
from rewards.sources import all_entries
from rewards.verifiers import MathVerifier, TextVerifier
from rewards.verify import ExactInteger, Verifier
from rewards.worker import RewardWorker
from rollout.types import Prompt, RewardStatus
from tests.rewards.test_every_dataset import NEEDS_OTHERS, SMALLER
from tests.rewards.verifiers import a_prompt

GYM = ("chain_sum", "leg_counting", "countdown", "simple_equations", "prime_factorization", "complex_arithmetic",
       "decimal_arithmetic", "polynomial_equations", "sudoku", "word_sorting", "propositional_logic")  # fmt: skip
THOROUGHLY = ("number", "math", "text", "integer", "countdown", "simple_equations", "complex_arithmetic")
LIMIT_S = 1.0
NASTY = (
    "", " ", "\x00", "\x00\x00<answer>\x00</answer>", "\u202e1\u202c", "\ud800", "a\ud800b", "\u0661\u0662\u0663",
    "9**9**9**9", "<answer>9**9**9**9</answer>", "9" * 5000, "1/0", "1e999999999", "nan", "inf", "-", "--1", "0x10",
    "(" * 10_000 + ")" * 10_000, "[" * 10_000, "{" * 10_000, "\\boxed{" * 5000, "\\frac{" * 3000, "x" * 1_000_000,
    "1 " * 500_000, "<answer>" * 100_000, "answer is " * 50_000, "#### " * 100_000, "__import__('os')._exit(3)",
    "exec('while True: pass')", "import sys; sys.exit()", "'; DROP TABLE answers; --", "%s%n%x" * 100, "\\" * 10_000,
    "\n" * 100_000, "1" + "0" * 400 + "/" + "3" * 400, "I" * 10_000 + "V", "√" * 1000, "∞", "½", "１２", "a\r\nb\r",
)  # fmt: skip
ALPHABET = string.printable + "\x00\u202e\ud8001234567890()[]{}\\/^*+-=<>#$% éπ∑"


@pytest.fixture(scope="module")
def tasks() -> tuple[dict[str, Verifier], dict[str, list[Prompt]]]:
    """At least ten verifiers with a few prompts each."""
    verifiers: dict[str, Verifier] = {
        "number": NumberVerifier(), "math": MathVerifier(), "text": TextVerifier(), "integer": ExactInteger()
    }  # fmt: skip
    prompts = {name: [a_prompt(name, answer="12")] for name in verifiers}
    for name in GYM:
        task = TaskConfig(name=name, dataset=name, size=3)
        prompts[name], verifiers[name] = all_entries(task, DataConfig(seed=3, tasks=(task,)))
    return verifiers, prompts


def hostile(count: int, seed: int) -> list[str]:
    """Random strings: noise, cuttings of nasty ones, repetitions."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        kind = rng.randrange(4)
        if kind == 0:
            made.append("".join(rng.choices(ALPHABET, k=rng.randrange(80))))
        elif kind == 1:
            nasty = rng.choice(NASTY)
            start = rng.randrange(len(nasty) + 1)
            made.append(nasty[start : start + rng.randrange(2000)])
        elif kind == 2:
            made.append(
                rng.choice(("(", "9**", "-", "\\frac{1}{", "x^", "<answer>", "sqrt(", "[1, ")) * rng.randrange(300)
            )
        else:
            text = list(str(rng.randrange(10**6)) + rng.choice(("", " apples", "!", ".0", "e5")))
            text.insert(rng.randrange(len(text) + 1), rng.choice(ALPHABET))
            made.append("".join(text))
    return made


def check(tasks: tuple[dict[str, Verifier], dict[str, list[Prompt]]], cases: list[tuple[str, str]]) -> dict[str, int]:
    """Scores (verifier, answer) pairs; counts the statuses."""
    verifiers, prompts = tasks
    worker = RewardWorker(verifiers, RewardsConfig(timeout_s=LIMIT_S, binary_at=None))
    counts: dict[str, int] = {}
    try:
        names = list(verifiers)
        sane = [(prompts[name][0], prompts[name][0].answer) for name in names if prompts[name][0].answer]
        before = worker.score_texts(sane)
        for at in range(0, len(cases), 50):
            answers = [
                (prompts[name][i % len(prompts[name])], text) for i, (name, text) in enumerate(cases[at : at + 50])
            ]
            began = time.monotonic()
            scores = worker.score_texts(answers)
            late = sum(score.status is RewardStatus.TIMEOUT for score in scores)
            assert len(scores) == len(answers)
            assert time.monotonic() - began < 60 + (LIMIT_S + 20) * late, "a stall that no status tells of"
            for score, (prompt, text) in zip(scores, answers, strict=True):
                counts[score.status.value] = counts.get(score.status.value, 0) + 1
                assert score.status is RewardStatus.OK or score.reason, (prompt.task, text[:60])
                accepted = score.status is RewardStatus.OK and score.reward >= 0.99
                plain = "".join(unicodedata.normalize("NFKC", text).replace(",", "").split())
                gold = "".join(prompt.answer.split())
                assert not accepted or gold in plain or number(gold) == number(plain), (prompt.task, gold, text[:60])
        assert worker.score_texts(sane) == before
    finally:
        worker.close()
    return counts


def number(text: str) -> float:
    """The number that a text is; nan, which equals nothing, when it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def in_turn(tasks: tuple[dict[str, Verifier], dict[str, list[Prompt]]], texts: list[str]) -> list[tuple[str, str]]:
    """Every text for one verifier, all verifiers in turn."""
    names = list(tasks[0])
    return [(names[i % len(names)], text) for i, text in enumerate(texts)]


def test_the_nastiest_answers(tasks: tuple[dict[str, Verifier], dict[str, list[Prompt]]]) -> None:
    cases = [(name, text) for name in THOROUGHLY for text in NASTY]
    counts = check(tasks, cases)
    print(counts)
    assert sum(counts.values()) == len(cases)


def test_a_thousand_hostile_strings(tasks: tuple[dict[str, Verifier], dict[str, list[Prompt]]]) -> None:
    counts = check(tasks, in_turn(tasks, hostile(1000, seed=1)))
    print(counts)
    assert sum(counts.values()) == 1000


@pytest.mark.slow
def test_ten_thousand_hostile_strings(tasks: tuple[dict[str, Verifier], dict[str, list[Prompt]]]) -> None:
    counts = check(tasks, in_turn(tasks, hostile(10_000, seed=2)))
    print(counts)
    assert sum(counts.values()) == 10_000


FAST = 4  # hostile completions a data set in the fast test, others for each
PER_CALL = 2  # a verifier that is late three times in a row is not asked again in that call


def hostile_cases(prompts: Sequence[Prompt], texts: Sequence[Hostile]) -> list[tuple[Prompt, Hostile]]:
    """Every text for one of the prompts, of which the text does not hold the gold answer if there is such a one."""
    cases = []
    for at, text in enumerate(texts):
        apart = [prompt for prompt in prompts if not holds_gold(prompt, text)] or prompts
        cases.append((apart[at % len(apart)], text))
    return cases


def holds_gold(prompt: Prompt, text: Hostile) -> bool:
    """Whether the text may be right for the prompt."""
    return prompt.answer.casefold() in (text.before + text.unit + text.after).casefold() if prompt.answer else False


def try_hostile(names: Sequence[str], texts: Callable[[int], Sequence[Hostile]]) -> Counter[str]:
    """Hostile completions for each data set, all in one worker; counts the statuses."""
    tasks, verifiers = {}, {}
    with one_generator():
        for name in names:
            task = TaskConfig(name=name, dataset=name, size=3, config=SMALLER.get(name, {}))
            tasks[name], verifiers[name] = all_entries(task, DataConfig(seed=11, tasks=(task,)))
    for kind, verifier in (("number", NumberVerifier()), ("math", MathVerifier()), ("text", TextVerifier())):
        tasks[kind], verifiers[kind] = [a_prompt(kind, answer="777771")], verifier
    counts: Counter[str] = Counter()
    CANARY.unlink(missing_ok=True)
    with closing(RewardWorker(verifiers, RewardsConfig(timeout_s=LIMIT_S, jail="require"))) as worker:
        sane = [(p, p.answer) for prompts in tasks.values() for p in prompts[:1] if p.answer]
        before = worker.score_texts(sane)
        assert [prompt.task for (prompt, _), score in zip(sane, before, strict=True) if score.right != 1] == []
        for place, (name, prompts) in enumerate(tasks.items()):
            cases = hostile_cases(prompts, texts(place))
            for at in range(0, len(cases), PER_CALL):
                chunk = cases[at : at + PER_CALL]
                scores = worker.score_texts([(prompt, text.text) for prompt, text in chunk])
                for (prompt, text), score in zip(chunk, scores, strict=True):
                    counts[score.status.value] += 1
                    judged = score.status is RewardStatus.OK and not holds_gold(prompt, text)
                    assert not judged or score.right == 0, (name, text.name, prompt.answer)
                    assert f"(exit code {EXIT_CODE})" not in score.reason, (name, text.name)
        assert worker.score_texts(sane) == before
    assert not CANARY.exists()
    return counts


def test_hostile_completions_for_every_data_set_some() -> None:
    counts = try_hostile(sorted(set(DATASETS) - NEEDS_OTHERS), lambda place: [
        HOSTILE[(FAST * place + n) % len(HOSTILE)] for n in range(FAST)
    ])  # fmt: skip
    print(counts)
    assert sum(counts.values()) > FAST * len(DATASETS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hostile_completions_for_every_data_set() -> None:
    counts = try_hostile(sorted(set(DATASETS) - NEEDS_OTHERS), lambda place: HOSTILE)
    print(counts)
    assert sum(counts.values()) > 60 * len(DATASETS)
