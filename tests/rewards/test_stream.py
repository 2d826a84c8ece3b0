"""The order of the training stream."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.run import groups
from rewards.config import DataConfig
from rewards.sources import Task, build_tasks
from rewards.stream import PromptStream
from rewards.verify import RewardsError
from tests.rewards.conftest import BOTH, LEGS, SUMS, data_of
from tests.rewards.test_worker import a_group
from tests.rewards.verifiers import a_prompt


def fake_tasks(weights: dict[str, float], size: int = 10) -> tuple[dict[str, Task], DataConfig]:
    """Tasks with `size` numbered training prompts each."""
    data = data_of(*({"name": name, "weight": weight, "plugin": "a:B"} for name, weight in weights.items()))
    tasks = {}
    for config in data.tasks:
        pool = tuple(a_prompt(config.name, f"{config.name} {n}", ordinal=n) for n in range(size))
        tasks[config.name] = Task(config.name, config, pool, (), (), verifier=None)  # type: ignore[arg-type]
    return tasks, data


def test_a_prompt_depends_on_its_ordinal_alone(tasks: dict[str, Task], data: DataConfig) -> None:
    forwards = PromptStream(tasks, data)
    backwards = PromptStream(build_tasks(data), data)
    there = [forwards.prompt(n) for n in range(300)]
    back = [backwards.prompt(n) for n in reversed(range(300))]
    assert there == back[::-1]
    assert [prompt.ordinal for prompt in there] == list(range(300))
    held_out = {p.text for task in tasks.values() for p in (*task.validation, *task.test)}
    assert not held_out & {prompt.text for prompt in there}


def test_another_data_seed_gives_another_order(tasks: dict[str, Task]) -> None:
    one = PromptStream(tasks, data_of(BOTH, SUMS, LEGS, seed=1))
    two = PromptStream(tasks, data_of(BOTH, SUMS, LEGS, seed=2))
    assert [one.prompt(n).text for n in range(50)] != [two.prompt(n).text for n in range(50)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 500), st.integers(1, 60))
def test_every_window_has_nearly_exact_shares(weights: list[int], start: int, length: int) -> None:
    named = {f"t{n}": weight / 10 for n, weight in enumerate(weights)}
    stream = PromptStream(*fake_tasks(named))
    seen = Counter(stream.prompt(n).task for n in range(start, start + length))
    for name, weight in named.items():
        assert abs(seen[name] - length * weight / sum(named.values())) < 2


def test_uneven_weights_keep_their_shares_and_weight_zero_is_never_issued() -> None:
    stream = PromptStream(*fake_tasks({"a": 0.123456, "b": 3.14159, "c": 0.0}))
    seen = Counter(stream.prompt(n).task for n in range(5000))
    assert seen["a"] / 5000 == pytest.approx(0.123456 / (0.123456 + 3.14159), abs=0.001)
    assert seen["c"] == 0


def test_each_epoch_issues_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(*fake_tasks({"a": 1.0, "b": 2.0}, size=30))
    issued = [p.text for n in range(270) if (p := stream.prompt(n)).task == "a"]
    epochs = [issued[:30], issued[30:60], issued[60:90]]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_many_epochs_stay_correct_though_only_some_orders_are_kept() -> None:
    stream = PromptStream(*fake_tasks({"a": 1.0}, size=2))
    early = [stream.prompt(n).text for n in range(40)]
    for n in range(1000):
        stream.prompt(n)
    assert len(stream._orders) <= 64
    assert [stream.prompt(n).text for n in range(40)] == early


def test_a_stream_resumes_after_a_round_trip_through_json(tasks: dict[str, Task], data: DataConfig) -> None:
    first, again = PromptStream(tasks, data), PromptStream(build_tasks(data), data)
    expected = [first.prompt(n) for n in range(50)]
    again.restore(json.loads(json.dumps(first.state())))
    assert [again.prompt(n) for n in range(50)] == expected


@pytest.mark.parametrize("own", [3, "hard", Fraction(1, 2)])
def test_a_task_s_own_level_is_no_level_of_a_curriculum(tmp_path: Path, own: object) -> None:
    tasks, data = fake_tasks({"x": 1.0})
    pool = tuple(replace(prompt, payload={"level": own}) for prompt in tasks["x"].train)
    stream = PromptStream({"x": replace(tasks["x"], train=pool)}, data)
    group = replace(a_group("1"), prompt=stream.prompt(7))
    groups.write(tmp_path, 1, [group])
    assert groups.read(tmp_path, 1, stream.prompt)[0].prompt == group.prompt
    assert stream.prompt(7, level=3) == group.prompt, "as in files that were written before"


def test_the_state_of_another_configuration_is_refused(tasks: dict[str, Task], data: DataConfig) -> None:
    stream = PromptStream(tasks, data)
    for change, message in (
        (data_of(BOTH, SUMS, LEGS, seed=5), "data.seed is 1, the run's was 5"),
        (
            data_of(BOTH, LEGS, SUMS),
            r"data.tasks are \['both', 'sums', 'legs'\], the run's were \['both', 'legs'",
        ),
        (data_of(BOTH, SUMS, LEGS | {"weight": 3.0}), "the weight of task 'legs' differs"),
        (data_of(BOTH, SUMS | {"size": 3100}, LEGS), "the prompts of task 'both' differ"),
        (data_of(BOTH, SUMS, LEGS, template="Q: {question}\nAnswer:"), "the prompts of task 'both' differ"),
    ):
        with pytest.raises(RewardsError, match=message):
            stream.restore(PromptStream(build_tasks(change), change).state())
    with pytest.raises(RewardsError, match="the run's was None"):
        stream.restore({})


def test_a_weight_that_never_comes_up_and_a_negative_ordinal_are_refused() -> None:
    with pytest.raises(RewardsError, match=r"task 'a': weight 0\.0001 is under 1/1000 of the stream"):
        PromptStream(*fake_tasks({"a": 0.0001, "b": 3.3}))
    with pytest.raises(ValueError, match="starts at ordinal 0"):
        PromptStream(*fake_tasks({"a": 1.0})).prompt(-1)
