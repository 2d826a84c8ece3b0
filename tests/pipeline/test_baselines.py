"""Frozen baselines are measured once for equal models, prompts and settings, and anew for others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import RunConfig, parse
from cluster.run.baselines import KnownBaselines
from cluster.run.evaluate import Evaluator
from cluster.run.fleet import Fleet
from rewards.sources import Task, build_tasks
from rollout.types import RewardStatus

RESULT = {"tasks": {"sums": 0.5}, "mean": 0.5, "prompts": {"sums": 2}, "outcomes": {"sums": [0, 1]}}


def configuration(folder: Path | None, **changes: object) -> RunConfig:
    """One Reasoning Gym task."""
    task = {"name": "sums", "dataset": "chain_sum", "size": 60, "config": {"max_terms": 2, "max_digits": 1}}
    return parse(
        {
            "run": "r",
            "steps": 1,
            "data": {"tasks": [task | changes.pop("task", {})]},  # type: ignore[operator]
            "experts": [{"name": "one", "model": "one"}],
            "policy": {"model": "p"},
            "evaluation": {"prompts": 2, "router_examples": 3, "cache": str(folder) if folder else None},
            **changes,
        },
        "test",
    )


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """The task's prompts."""
    return build_tasks(configuration(None).data)


def evaluator(config: RunConfig, tasks: dict[str, Task], models: tuple[str, ...] = ("m", "p")) -> Evaluator:
    """An evaluator whose measuring is counted, and answers `RESULT`."""
    made = Evaluator(config, Fleet([], [], [], [], 1.0), tasks, KnownBaselines(config, tasks, models))
    made.measured = 0  # type: ignore[attr-defined]
    made.verdict = RewardStatus.OK  # type: ignore[attr-defined]

    async def measure(*_: object) -> dict:
        made.measured += 1  # type: ignore[attr-defined]
        made._outcome(made.verdict, 1.0)  # type: ignore[attr-defined]
        return {"frozen_policy": RESULT}

    made._measure_baselines = measure  # type: ignore[method-assign, assignment]
    return made


def baselines(made: Evaluator, count: int = 2) -> dict:
    """What the evaluator says, on so many prompts."""
    return asyncio.run(made.baselines(made.prompts("test", count), None))


def test_equal_runs_measure_once(tmp_path: Path, tasks: dict[str, Task]) -> None:
    first = evaluator(configuration(tmp_path / "deep" / "folder"), tasks)
    other = {"seed": 5, "steps": 9, "rewards": {"workers": 3}, "task": {"weight": 2.0}}
    again = evaluator(configuration(tmp_path / "deep" / "folder", **other), tasks)
    assert baselines(first) == baselines(again) == {"frozen_policy": RESULT}
    assert (first.measured, again.measured) == (1, 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"max_new_tokens": 7}},
        {"sampling": {"stop": ["Q:"]}},
        {"rewards": {"binary_at": None}},
        {"policy": {"model": "p", "dtype": "bfloat16"}},
        {"evaluation": {"prompts": 2, "router_examples": 4}},
    ],
)
def test_other_settings_measure_again(tmp_path: Path, tasks: dict[str, Task], change: dict) -> None:
    baselines(evaluator(configuration(tmp_path), tasks))
    if "evaluation" in change:
        change["evaluation"] |= {"cache": str(tmp_path)}
    other = evaluator(configuration(tmp_path, **change), tasks)
    baselines(other)
    assert other.measured == 1  # type: ignore[attr-defined]


def test_other_models_or_prompts_measure_again(tmp_path: Path, tasks: dict[str, Task]) -> None:
    config = configuration(tmp_path)
    baselines(evaluator(config, tasks))
    swapped, more = evaluator(config, tasks, ("p", "m")), evaluator(config, tasks)
    baselines(swapped)
    baselines(more, count=1)
    assert (swapped.measured, more.measured) == (1, 1)  # type: ignore[attr-defined]


def test_without_a_folder_or_with_a_plugin_nothing_is_kept(tmp_path: Path, tasks: dict[str, Task]) -> None:
    config = configuration(tmp_path)
    plugin = tasks["sums"].config.model_copy(update={"dataset": None, "plugin": "a:B"})
    of_a_plugin = {"sums": Task("sums", plugin, *(tasks["sums"].train[:9],) * 3, tasks["sums"].verifier)}
    for made in (evaluator(configuration(None), tasks), evaluator(config, of_a_plugin)):
        baselines(made)
        baselines(made)
        assert made.measured == 2  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"verifier": "a:b"}, {"rewards": ({"kind": "a:b"},)}])
def test_with_code_of_the_user_s_own_nothing_is_kept(tmp_path: Path, tasks: dict[str, Task], change: dict) -> None:
    config = configuration(tmp_path)
    task = tasks["sums"]
    changed = type(task.config).model_validate(task.config.model_dump() | change)
    made = evaluator(config, {"sums": replace(task, config=changed)})
    baselines(made)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path, tasks: dict[str, Task]) -> None:
    (tmp_path / "file").write_text("")
    assert baselines(evaluator(configuration(tmp_path / "file" / "deep"), tasks)) == {"frozen_policy": RESULT}


def test_a_measurement_with_late_verifiers_is_not_kept(tmp_path: Path, tasks: dict[str, Task]) -> None:
    made = evaluator(configuration(tmp_path), tasks)
    made.verdict = RewardStatus.TIMEOUT  # type: ignore[attr-defined]
    baselines(made)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_file_is_measured_again(tmp_path: Path, tasks: dict[str, Task]) -> None:
    baselines(evaluator(configuration(tmp_path), tasks))
    (kept,) = tmp_path.iterdir()
    kept.write_text('{"frozen_pol')
    made = evaluator(configuration(tmp_path), tasks)
    assert baselines(made) == {"frozen_policy": RESULT}
    assert made.measured == 1  # type: ignore[attr-defined]
