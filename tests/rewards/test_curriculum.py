"""Automatic difficulty: when a level changes, for which prompts, and that a resumed stream goes on the same way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.run import groups
from rewards.config import CurriculumConfig, TaskConfig
from rewards.curriculum import Curriculum
from rewards.sources import Task, build_tasks, of_length
from rewards.stream import PromptStream
from rewards.verify import RewardsError
from tests.rewards.conftest import LEGS, data_of
from tests.rewards.test_worker import a_group

GROWING = {
    "name": "sums",
    "dataset": "chain_sum",
    "size": 900,
    "config": {"min_digits": 1, "max_digits": 1},
    "curriculum": {"levels": [0, 1, 2], "window": 4},
}


@pytest.fixture(scope="module")
def growing() -> dict[str, Task]:
    """A task with a curriculum beside one without."""
    return build_tasks(data_of(GROWING, LEGS))


def terms(text: str) -> int:
    """How many numbers a question adds up."""
    return text.count("+") + text.count(" - ") + 1


def test_training_starts_at_the_first_level_and_held_out_prompts_come_from_all(growing: dict[str, Task]) -> None:
    stream = PromptStream(growing, data_of(GROWING, LEGS))
    issued = [p for n in range(120) if (p := stream.prompt(n)).task == "sums"]
    assert {terms(prompt.text) for prompt in issued} == {2}
    assert {prompt.payload["level"] for prompt in growing["sums"].test} == {0, 1, 2}
    assert stream.levels() == {"sums": 0}


def test_answers_that_are_right_raise_the_level_for_prompts_not_yet_issued(growing: dict[str, Task]) -> None:
    stream = PromptStream(growing, data_of(GROWING, LEGS))
    mine = [n for n in range(60) if stream.prompt(n).task == "sums"]
    before = [stream.prompt(n) for n in range(30)]
    for ordinal in mine[:3]:
        stream.note("sums", ordinal, 1.0)
    stream.note("legs", 1, 1.0)
    stream.advance(unissued=30)
    assert stream.levels() == {"sums": 0}, "three are no window of four"
    stream.note("sums", mine[3], 1.0)
    assert stream.levels() == {"sums": 0}, "nothing moves before the update"
    stream.advance(unissued=30)
    assert stream.levels() == {"sums": 1}
    assert [stream.prompt(n) for n in range(30)] == before
    later = {terms(p.text) for n in range(30, 300) if (p := stream.prompt(n)).task == "sums"}
    assert later == {2, 3}
    assert stream.prompt(mine[0], level=2).payload["level"] == 2


def test_a_group_s_prompt_keeps_its_level_in_a_file(growing: dict[str, Task], tmp_path: Path) -> None:
    stream = PromptStream(growing, data_of(GROWING, LEGS))
    mine = next(n for n in range(60) if stream.prompt(n).task == "sums")
    groups.write(tmp_path, 1, [replace(a_group("1"), prompt=stream.prompt(mine, level=2))])
    assert groups.read(tmp_path, 1, stream.prompt)[0].prompt == stream.prompt(mine, level=2) != stream.prompt(mine)


def test_its_scoring_is_that_of_the_prompt_s_own_level(growing: dict[str, Task]) -> None:
    verifier = growing["sums"].verifier
    for prompt in growing["sums"].test[:30]:
        assert verifier.score(prompt.answer, prompt) == 1.0


def test_wrong_answers_lower_the_level_and_neither_end_is_passed() -> None:
    one = Curriculum(CurriculumConfig(levels=(2, 5), raise_at=0.8, lower_at=0.2, window=2))
    seen = []
    for start, right in ((0, 0.1), (10, 0.9), (20, 1.0), (30, 0.5), (40, 0.0)):
        for ordinal in (start, start + 1):
            one.note(ordinal, right)
        one.advance(start + 10)
        seen.append(one.level)
    assert seen == [2, 5, 5, 5, 2]
    assert [one.level_of(n) for n in (0, 19, 20, 49, 50)] == [2, 2, 5, 5, 2]


def test_results_of_another_level_do_not_count() -> None:
    one = Curriculum(CurriculumConfig(levels=(0, 1, 2), raise_at=0.8, window=2))
    for ordinal in range(6):  # all issued before the first move, finished after it
        one.note(ordinal, 1.0)
    one.advance(100)
    assert one.level == 1


@given(st.data())
def test_the_order_in_which_results_come_does_not_matter_and_a_restored_one_goes_on_alike(data: st.DataObject) -> None:
    config = CurriculumConfig(levels=(0, 1, 2, 3), raise_at=0.6, lower_at=0.3, window=data.draw(st.integers(1, 5)))
    one, other, issued = Curriculum(config), Curriculum(config), 0
    fixed: list[int] = []
    for _ in range(data.draw(st.integers(1, 12))):
        batch = range(issued, issued + data.draw(st.integers(1, 6)))
        issued = batch.stop
        results = {n: data.draw(st.floats(0, 1)) for n in batch}
        for ordinal in batch:
            one.note(ordinal, results[ordinal])
        for ordinal in data.draw(st.permutations(list(batch))):
            other.note(ordinal, results[ordinal])
        if data.draw(st.booleans()):
            again = Curriculum(config)
            again.restore(json.loads(json.dumps(other.state())))
            other = again
        fixed += [one.level_of(n) for n in batch]
        one.advance(issued)
        other.advance(issued)
        assert one.state() == other.state()
        assert [one.level_of(n) for n in range(issued)] == fixed, "the level of an issued prompt moved"


def test_a_stream_resumes_in_the_middle_of_a_curriculum(growing: dict[str, Task]) -> None:
    data = data_of(GROWING, LEGS)
    first, again = PromptStream(growing, data), PromptStream(build_tasks(data), data)
    mine = [n for n in range(60) if first.prompt(n).task == "sums"]
    for ordinal in mine[:6]:
        first.note("sums", ordinal, 1.0)
    first.advance(unissued=20)
    first.note("sums", mine[-1], 1.0)
    again.restore(json.loads(json.dumps(first.state())))
    for stream in (first, again):
        for ordinal in mine[-4:-1]:
            stream.note("sums", ordinal, 1.0)
        stream.advance(unissued=60)
    assert first.levels() == again.levels() == {"sums": 2}
    assert [first.prompt(n) for n in range(200)] == [again.prompt(n) for n in range(200)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 1}, "give level or curriculum, not both"),
        ({"curriculum": {"levels": [1, 0]}}, r"levels must rise from 0 or above, got \[1, 0\]"),
        ({"curriculum": {"levels": [0, 1], "raise_at": 0.5, "lower_at": 0.5}}, "must be below raise_at"),
        ({"dataset": None, "config": {}, "path": "a.jsonl"}, "curriculum is for dataset or category; path takes none"),
    ],
)
def test_a_curriculum_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig.model_validate(GROWING | change)


def test_a_level_too_high_or_without_prompts_is_refused() -> None:
    with pytest.raises(RewardsError, match=r"ends at level \d+, level is 99"):
        build_tasks(data_of(GROWING | {"curriculum": {"levels": [0, 99]}}))
    small = GROWING | {"size": 40, "config": {}, "answers": {"min": 2, "max": 5}, "curriculum": {"levels": [0, 3]}}
    with pytest.raises(RewardsError, match="level 3 of its curriculum has no training prompts"):
        build_tasks(data_of(small))


def test_a_level_whose_prompts_are_all_too_long_is_refused(growing: dict[str, Task]) -> None:
    """Else a run would find out when it gets there, hours later."""
    data = data_of(GROWING, LEGS).model_copy(update={"max_prompt_tokens": 20})
    message = (
        r"task 'sums': level 1 of its curriculum has no training prompts of at most data.max_prompt_tokens \(20\); "
        "raise it or leave the level out"
    )
    long = {prompt.text for prompt in growing["sums"].train if prompt.payload["level"] == 1}
    with pytest.raises(RewardsError, match=message):
        of_length(growing, data, lambda prompt: 20 + (prompt.text in long))
