"""Held-out prompts stay held out, and pools are balanced by answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.config import AnswerRange, DataConfig
from rewards.sources import Task, build_tasks
from rewards.splits import (
    SPLITS,
    Balance,
    apportion,
    check_disjoint,
    check_questions,
    questions_of,
    split_of,
    within,
)
from rewards.verify import RewardsError
from rollout.types import Prompt
from tests.rewards.conftest import BOTH, LEGS, SUMS, data_of
from tests.rewards.verifiers import a_prompt


def test_no_prompt_is_in_two_splits_and_held_out_prompts_are_distinct(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        pools = {"train": task.train, "validation": task.validation, "test": task.test}
        texts = {split: [prompt.text for prompt in pool] for split, pool in pools.items()}
        assert not set(texts["train"]) & set(texts["validation"])
        assert not set(texts["train"]) & set(texts["test"])
        assert not set(texts["validation"]) & set(texts["test"])
        assert len(set(texts["test"])) == len(texts["test"]) > 70
        assert len(set(texts["validation"])) == len(texts["validation"]) > 40
        assert [prompt.ordinal for prompt in task.train] == list(range(len(task.train)))


def test_a_prompt_stays_in_its_split_whatever_the_seed_the_size_and_the_other_tasks(tasks: dict[str, Task]) -> None:
    other = build_tasks(data_of(LEGS, SUMS | {"size": 6000}, BOTH | {"operation": "maximum"}, seed=77))["sums"]
    mine, theirs = tasks["sums"], other
    shared = {p.text for p in mine.train} & {p.text for p in theirs.train}
    assert len(shared) > 300
    assert not {p.text for p in mine.train} & {p.text for p in (*theirs.validation, *theirs.test)}
    assert not {p.text for p in theirs.train} & {p.text for p in (*mine.validation, *mine.test)}
    assert not {p.text for p in mine.test} & {p.text for p in theirs.validation}


def test_the_split_of_a_known_prompt_never_changes(data: DataConfig) -> None:
    """Zoos and checkpoints in the field rely on it: a change of salt or hash must be deliberate."""
    found = [split_of(f"{n} + 1 =\nAnswer:", data) for n in range(12)]
    assert [n for n, split in enumerate(found) if split == "test"] == [1, 9, 11]
    assert [n for n, split in enumerate(found) if split == "validation"] == [3, 8]


@given(st.text(), st.floats(0.01, 0.4), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
def test_changing_the_validation_share_moves_nothing_in_or_out_of_test(
    text: str, test: float, one: float, another: float
) -> None:
    splits = {split_of(text, data_of(SUMS, test=test, validation=share)) for share in (one, another)}
    assert splits == {"test"} or "test" not in splits


def test_the_shares_are_those_asked_for(data: DataConfig) -> None:
    counts = Counter(split_of(f"question {n}", data) for n in range(20_000))
    assert counts["test"] / 20_000 == pytest.approx(data.test, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(data.validation, abs=0.01)


def test_the_check_refuses_a_text_in_two_splits_and_a_repeated_held_out_text() -> None:
    one, two = a_prompt(text="one"), a_prompt(text="two")
    check_disjoint("t", {"train": (one, one), "validation": (two,), "test": ()})
    with pytest.raises(RewardsError, match="both in train and in test: 'one'"):
        check_disjoint("t", {"train": (one,), "validation": (two,), "test": (one,)})
    with pytest.raises(RewardsError, match="2 times in test"):
        check_disjoint("t", {"train": (one,), "validation": (), "test": (two, two)})


def test_a_range_keeps_integers_inside_it_only() -> None:
    entries = [a_prompt(answer=answer) for answer in ("-1", "0", "5", "12", "13", "5.5", "five")]
    assert [e.answer for e in within(entries, AnswerRange(min=0, max=12))] == ["0", "5", "12"]
    assert within(entries, None) == entries


def test_weights_are_frequencies_to_the_power_of_the_balance() -> None:
    entries = [a_prompt(text=f"a{n}", answer="1") for n in range(900)] + [
        a_prompt(text=f"b{n}", answer="2") for n in range(100)
    ]
    for exponent in (0.0, 0.15, 0.5, 1.0):
        drawn = Counter(e.answer for e in Balance(entries, exponent).resample(entries, 1000, Random(0)))
        expected = 1000 * 0.9**exponent / (0.9**exponent + 0.1**exponent)
        assert drawn["1"] == pytest.approx(expected, abs=1)


def test_resampling_uses_every_entry_of_a_value_before_it_repeats_one() -> None:
    entries = [a_prompt(text=str(n), answer="1") for n in range(10)]
    times = Counter(e.text for e in Balance(entries, 0.5).resample(entries, 25, Random(0)))
    assert len(times) == 10
    assert set(times.values()) == {2, 3}


def test_held_out_order_is_balanced_from_its_start_and_loses_nothing() -> None:
    entries = [a_prompt(text=f"a{n}", answer="1") for n in range(900)] + [
        a_prompt(text=f"b{n}", answer="2") for n in range(100)
    ]
    ordered = Balance(entries, 0.0).order(entries, Random(0))
    assert sorted(e.text for e in ordered) == sorted(e.text for e in entries)
    assert Counter(e.answer for e in ordered[:100])["1"] == pytest.approx(50, abs=15)


@given(st.dictionaries(st.text(max_size=3), st.floats(0.001, 1.0), min_size=1, max_size=8), st.integers(0, 500))
def test_apportioned_counts_sum_up_and_stay_within_one_of_exact(weights: dict[str, float], count: int) -> None:
    counts = apportion(weights, count)
    assert sum(counts.values()) == count
    total = sum(weights.values())
    assert all(abs(counts[key] - count * weight / total) < 1 + 1e-6 for key, weight in weights.items())


QUESTION_KINDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 50),
        "validation": st.sampled_from([0.1, 0.3]),
        "test": st.sampled_from([0.15, 0.4]),
        "size": st.integers(20, 120),
        "balance": st.sampled_from([0.15, 1.0]),
        "template": st.sampled_from([None, "1 + 1\n{question} ="]),
        "words": st.sampled_from(["words", "parity", "roman", "sentence"]),
        "pair": st.sampled_from(["sum", "larger", "maximum"]),
    }
)


def questions(prompts: Sequence[Prompt]) -> set[str]:
    return {part["question"] for prompt in prompts for part in questions_of(prompt)}


@settings(max_examples=25, deadline=None)
@given(QUESTION_KINDS)
def test_no_question_of_a_held_out_prompt_is_in_a_training_pool(made: dict[str, Any]) -> None:
    """Alone or as a part, in any task, also of another size and seed, as the zoo's worlds have."""
    found: dict[str, set[str]] = {split: set() for split in SPLITS}
    for seed, size in ((made["seed"], made["size"]), (made["seed"] + 1, 100)):
        one = {"plugin": "tests.zoo.plugin:Plus", "answers": {"min": 1, "max": 30, "balance": made["balance"]}}
        data = data_of(
            {"name": "one"} | one,
            {"name": "other", "plugin": "tests.zoo.plugin:Twice"},
            {"name": "again"} | one,
            {"name": "form", "compose": ["one"], "operation": made["words"], "size": size},
            {"name": "both", "compose": ["one", "other"], "operation": made["pair"], "size": size}
            | ({"template": made["template"]} if made["template"] else {}),
            {"name": "three", "compose": ["one", "again", "other"], "size": size},
            split_by="question",
            **{"seed": seed, "validation": made["validation"], "test": made["test"]},
        )
        for task in build_tasks(data).values():
            for split, pool in task.pools.items():
                found[split] |= questions(pool)
    assert all(len(found[split]) > 5 for split in SPLITS)
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]


@pytest.mark.parametrize("recipe", ["quickstart", "separable", "curriculum"])
def test_a_recipe_of_ours_can_hold_its_questions_out(recipe: str) -> None:
    path = Path(__file__).parents[2] / "configs" / f"{recipe}.yaml"
    section = yaml.safe_load(path.read_text())["data"]
    small = [task | {"size": 300} for task in section["tasks"]]
    tasks = build_tasks(DataConfig.model_validate(section | {"tasks": small, "split_by": "question"}))
    trained, held_out = (
        questions([prompt for task in tasks.values() for split in splits for prompt in task.pools[split]])
        for splits in (SPLITS[:1], SPLITS[1:])
    )
    assert len(held_out) > 30 and not trained & held_out


@pytest.fixture(scope="module")
def by_question() -> dict[str, Task]:
    """The tasks of this folder, held out by question."""
    return build_tasks(data_of(BOTH, SUMS, LEGS, {"name": "roman", "compose": ["sums"], "operation": "roman"},
                               split_by="question"))  # fmt: skip


def test_compositions_follow_their_parts_splits_and_have_the_shares_asked_for(by_question: dict[str, Task]) -> None:
    both = by_question["both"].pools
    assert len(both["train"]) == 1500, "2000 without the held-out shares"
    assert 150 < len(both["validation"]) <= 200 and 230 < len(both["test"]) <= 300, "of which none comes twice"
    for name in ("sums", "legs"):
        alone = by_question[name].pools
        for split, pool in both.items():
            own = {part["question"] for prompt in pool for part in questions_of(prompt) if part["task"] == name}
            assert own and not own & questions([p for other in SPLITS if other != split for p in alone[other]])
    leaky = build_tasks(data_of(BOTH, SUMS, LEGS))["both"].pools
    assert questions(leaky["train"]) & questions(leaky["test"]), "with split_by: entry"


@pytest.mark.parametrize(("task", "kinds"), [("sums", r" [+-] "), ("legs", r"[0-9]+ ")])
def test_every_kind_of_question_is_held_out_in_about_the_same_share(
    by_question: dict[str, Task], task: str, kinds: str
) -> None:
    """Kinds: the number of terms, and of animals."""
    counts: dict[int, Counter[str]] = {}
    for split, pool in by_question[task].pools.items():
        for question in questions(pool):
            counts.setdefault(len(re.findall(kinds, question)), Counter())[split] += 1
    assert len(counts) == 2
    for kind in counts.values():
        total = kind.total()
        assert kind["test"] / total == pytest.approx(0.15, abs=3 * (0.15 * 0.85 / total) ** 0.5)
        assert kind["validation"] / total == pytest.approx(0.1, abs=3 * (0.1 * 0.9 / total) ** 0.5)


def test_compositions_have_the_kinds_of_their_parts_in_every_split(by_question: dict[str, Task]) -> None:
    def two_terms(pool: Sequence[Prompt]) -> float:
        first = [questions_of(prompt)[0]["question"] for prompt in pool]
        return sum(len(re.findall(" [+-] ", question)) == 1 for question in first) / len(first)

    pools = by_question["both"].pools
    assert two_terms(pools["test"]) == pytest.approx(two_terms(pools["train"]), abs=0.15)


def test_the_check_names_a_question_that_is_in_two_splits() -> None:
    def asked(task: str, *texts: str) -> Prompt:
        parts = [{"task": "sums", "question": text, "answer": "1"} for text in texts]
        return replace(a_prompt(task=task), payload={"question": " ".join(texts), "parts": parts})

    alone = replace(a_prompt(task="sums", text="Q: 1 + 0"), payload={"question": "1 + 0"})
    check_questions({"both": {"train": [asked("both", "1 + 0", "2 - 1")]}, "sums": {"train": [alone]}})
    with pytest.raises(RewardsError, match=r"task 'sums': .* in test, and in train of task 'both': '1 \+ 0'"):
        check_questions({"both": {"train": [asked("both", "2 - 1", "1 + 0")]}, "sums": {"test": [alone]}})


def test_a_source_s_own_splits_cannot_bring_a_held_out_question_into_training() -> None:
    doubles, trained = ({"name": name, "plugin": f"tests.rewards.verifiers:{name}"} for name in ("Doubles", "Trained"))
    build_tasks(data_of(doubles, trained))
    with pytest.raises(RewardsError, match=r"task 'Trained': this question is in train, and in .* of task 'Doubles'"):
        build_tasks(data_of(doubles, trained, split_by="question"))
