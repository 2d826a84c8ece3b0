"""The search for stand-ins, over a router whose answers are known: it answers by what stands in an expert's place."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.run import substitution
from cluster.run.fleet import Inline, Stage
from experts.expert import Encoded
from rollout.types import Prompt

EXPERTS = ("one", "two")
TASKS = ("x", "y")


@dataclass
class Evaluator:
    """Answers as many validation prompts right as the value of a stand-in's state says, if it is in its own place.

    hidden: that share, of the expert in a place with nothing there.  without: tasks that have no validation prompts.
    """

    hidden: Sequence[float] = (0.2, 0.2)
    names: Sequence[str] = TASKS
    validation: int = 40
    kind: str = "perceiver"
    states: str = "own"
    experts: Sequence[str] = EXPERTS
    without: Sequence[str] = ()
    asked: list[tuple[int, str]] = field(default_factory=list)

    @property
    def tasks(self) -> dict[str, None]:
        """By name."""
        return dict.fromkeys(self.names)

    @property
    def config(self) -> Any:
        """What the search reads of it."""
        evaluation = SimpleNamespace(validation_prompts=self.validation)
        return SimpleNamespace(evaluation=evaluation, router=SimpleNamespace(kind=self.kind, states=self.states))

    def prompts(self, split: str, count: int) -> list[Prompt]:
        """As the real one."""
        tasks = [task for task in self.names if split != "validation" or task not in self.without]
        return [Prompt(ordinal=i, task=t, messages=(), answer=f"{split} {i}") for t in tasks for i in range(count)]

    async def answered(
        self,
        chosen: Sequence[Prompt],
        router: Any,
        ask: Any,
        hidden: Sequence[int] = (),
        stand_ins: Mapping[int, np.ndarray] | None = None,
    ) -> Any:
        """Right for as many prompts of each task as the share says."""
        assert all(prompt.answer.startswith("validation") for prompt in chosen), "nothing is chosen on other prompts"
        share, what = 1.0, "whole"
        for place in hidden:
            share, what = self.hidden[place], "hidden"
        for place, state in (stand_ins or {}).items():
            share, what = float(state[0, 0]) if state[0, 1] == place else 0.0, "stand-in"
        self.asked.append((len(chosen), what))
        each = len(chosen) // len(self.names)
        return SimpleNamespace(outcomes=[int(prompt.ordinal < round(share * each)) for prompt in chosen])

    def result(self, chosen: Sequence[Prompt], outcomes: Sequence[int]) -> Any:
        """As the real one."""
        by_task: dict[str, list[int]] = {}
        for prompt, outcome in zip(chosen, outcomes, strict=True):
            by_task.setdefault(prompt.task, []).append(outcome)
        tasks = {task: float(np.mean(mine)) for task, mine in by_task.items()}
        return {"tasks": tasks, "mean": float(np.mean(list(tasks.values()))), "outcomes": by_task}


def fleet(values: Mapping[str, Sequence[float]]) -> Any:
    """Experts whose state of the training prompt in a place has this value."""

    def states(asked: Sequence[Prompt], keep: bool) -> list[Stage]:
        assert not keep and all(prompt.answer.startswith("train") for prompt in asked)

        def part(place: int, name: str) -> Encoded:
            made = tuple(np.array([[value, place]], np.float32) for value in values[name])
            assert len(made) == len(asked)
            return Encoded(name, ("",) * len(asked), made, 0, 0, 0.0, tuple(range(len(asked))))

        return [Stage.of(Inline(name, None), part(place, name)) for place, name in enumerate(EXPERTS)]

    async def get_all(references: Sequence[Any], what: str, stages: Sequence[Stage]) -> list[Any]:
        return list(references)

    return SimpleNamespace(states=states, encode=None, get_all=get_all)


def test_the_best_state_stands_in_and_one_that_may_be_better_by_luck_does_not() -> None:
    evaluator = Evaluator(hidden=(0.1, 0.5))
    values = {"one": (0.1, 0.2, 0.3, 0.9, 0.4, 0.0), "two": (0.1, 0.2, 0.55, 0.3, 0.0, 0.4)}
    found = asyncio.run(substitution.find(evaluator, fleet(values), None, 6))  # type: ignore[arg-type]
    assert (found.without["one"].task, found.without["two"].task) == ("y", "x"), "tasks take turns"
    assert found.without["one"].stood_in["mean"] == pytest.approx(0.9)
    assert found.without["two"].stood_in["mean"] == pytest.approx(0.55)
    kept = found.stand_ins
    assert list(kept) == ["one"], "two right answers more may be luck"
    assert kept["one"][0, 0] == np.float32(0.9)
    told = found.as_data()
    assert told["whole"]["mean"] == 1.0 and not told["without"]["two"]["used"]
    assert told["without"]["one"]["hidden"] == {"x": 0.1, "y": 0.1, "mean": pytest.approx(0.1)}
    assert told["without"]["two"]["hidden"]["mean"] == 0.5


@given(st.integers(1, 24), st.integers(1, 40), st.integers(1, 60), st.randoms(use_true_random=False))
def test_the_search_ends_at_the_best_within_its_budget(candidates: int, tasks: int, validation: int, rng: Any) -> None:
    # Shares that hold in any number of prompts: all or nothing.
    shares = [float(rng.random() > 0.8) for _ in range(candidates)]
    evaluator = Evaluator(names=[f"task {i}" for i in range(tasks)], validation=validation)
    values = {"one": shares, "two": shares}
    found = asyncio.run(substitution.find(evaluator, fleet(values), None, candidates))  # type: ignore[arg-type]
    assert found.without["one"].stood_in["mean"] == found.without["two"].stood_in["mean"] == max(shares)
    asked = sum(count for count, what in evaluator.asked if what == "stand-in") / 2
    one_each = tasks * 2 * candidates  # every candidate is asked about a prompt of every task at least
    assert asked <= max(substitution.ENOUGH, tasks) * (2 + substitution.halvings(candidates)) + one_each


@pytest.mark.parametrize(("tasks", "count", "expected"), [
    (2, 5, "a0 b0 a1 b1 a2"), (3, 3, "a0 b0 c0"), (4, 2, "a0 c0"), (1, 2, "a0 a1"),
])  # fmt: skip
def test_candidates_come_from_as_many_tasks_as_can_be(tasks: int, count: int, expected: str) -> None:
    found = substitution.spread(Evaluator(names="abcd"[:tasks]), count)  # type: ignore[arg-type]
    assert " ".join(f"{prompt.task}{prompt.ordinal}" for prompt in found) == expected


@pytest.mark.parametrize(
    ("changes", "possible"),
    [
        ({}, True),
        ({"kind": "static"}, False),
        ({"kind": "text"}, False),
        ({"experts": ("one",)}, False),
        ({"states": "shuffled"}, False),
        ({"without": ("y",)}, False),
    ],
)
def test_nothing_is_looked_for_where_nothing_could_stand_in(changes: dict[str, Any], possible: bool) -> None:
    assert substitution.possible(Evaluator(**changes)) is possible  # type: ignore[arg-type]
