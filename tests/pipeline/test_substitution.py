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
VALIDATION = 40


def prompts(split: str, count: int) -> list[Prompt]:
    """Of two tasks."""
    return [
        Prompt(ordinal=i, task=task, messages=(), answer=f"{split}{i}") for task in ("x", "y") for i in range(count)
    ]


@dataclass
class Evaluator:
    """Answers validation prompts right in as many cases as the value of a stand-in's state says.

    hidden: the same of an expert with nothing in its place.
    """

    hidden: float = 0.25
    stand_ins: int = 3
    kind: str = "perceiver"
    experts: Sequence[str] = EXPERTS
    asked: list[tuple[int, str]] = field(default_factory=list)

    @property
    def config(self) -> Any:
        """What the search reads of it."""
        evaluation = SimpleNamespace(stand_ins=self.stand_ins, validation_prompts=VALIDATION)
        return SimpleNamespace(evaluation=evaluation, router=SimpleNamespace(kind=self.kind))

    def prompts(self, split: str, count: int) -> list[Prompt]:
        """As the real one."""
        return prompts(split, count)

    async def answered(
        self,
        chosen: Sequence[Prompt],
        router: Any,
        ask: Any,
        hidden: Sequence[int] = (),
        stand_ins: Mapping[int, np.ndarray] | None = None,
    ) -> Any:
        """Right for as many prompts as the share says."""
        (share,) = [float(state[0, 0]) for state in stand_ins.values()] if stand_ins else (None,)
        share = self.hidden if hidden else 1.0 if share is None else share
        self.asked.append((len(chosen), "hidden" if hidden else "stand-in" if stand_ins else "whole"))
        half = len(chosen) // 2
        return SimpleNamespace(outcomes=[int(place % half < round(share * half)) for place in range(len(chosen))])

    def result(self, chosen: Sequence[Prompt], outcomes: Sequence[int]) -> Any:
        """As the real one."""
        mean = float(np.mean(outcomes))
        return {"tasks": {"x": mean, "y": mean}, "mean": mean}


def fleet(values: Mapping[str, Sequence[float]]) -> Any:
    """Experts whose state of the training prompt in a place has this value."""

    def encode(asked: Sequence[Prompt]) -> list[Stage]:
        def part(name: str) -> Encoded:
            states = tuple(np.full((1, 2), value, np.float32) for value in values[name])
            assert len(states) == len(asked)
            return Encoded(name, ("",) * len(asked), states, 0, 0, 0.0, tuple(range(len(asked))))

        return [Stage.of(Inline(name, None), part(name)) for name in EXPERTS]

    async def get_all(references: Sequence[Any], what: str, stages: Sequence[Stage]) -> list[Any]:
        return list(references)

    return SimpleNamespace(encode=encode, get_all=get_all)


def test_the_best_state_stands_in_and_one_that_does_no_better_than_nothing_does_not() -> None:
    evaluator = Evaluator(hidden=0.5)
    values = {"one": (0.1, 0.2, 0.3, 0.9, 0.4, 0.0), "two": (0.1, 0.5, 0.2, 0.3, 0.0, 0.4)}
    found = asyncio.run(substitution.find(evaluator, fleet(values), None))
    assert (found.without["one"].task, found.without["two"].task) == ("y", "x")
    assert found.without["one"].stood_in["mean"] == pytest.approx(0.9)
    kept = found.stand_ins("sum")
    assert kept.router == "sum" and list(kept.states) == ["one"], "the router bears the absence of `two` as well itself"
    assert kept.states["one"][0, 0] == np.float32(0.9)
    told = found.as_data()
    assert told["whole"]["mean"] == 1.0 and not told["without"]["two"]["used"]
    assert told["without"]["one"]["hidden"] == {"x": 0.5, "y": 0.5, "mean": 0.5}


@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_search_always_ends_at_the_best_and_asks_each_about_all_prompts_at_most_once(
    per_task: int, rng: Any
) -> None:
    shares = [round(rng.choice(range(VALIDATION + 1)) / VALIDATION, 3) for _ in range(2 * per_task)]
    # Shares that hold in any number of prompts: all or nothing.
    shares = [float(share > 0.8) for share in shares]
    evaluator = Evaluator(stand_ins=per_task)
    found = asyncio.run(substitution.find(evaluator, fleet({"one": shares, "two": shares}), None))
    assert found.without["one"].stood_in["mean"] == max(shares)
    on_all = [what for count, what in evaluator.asked if count == 2 * VALIDATION and what == "stand-in"]
    assert len(on_all) == 2 * min(2, 2 * per_task), "the last two of each expert"
    asked = sum(count for count, what in evaluator.asked if what == "stand-in") / 2
    rounds = substitution.halvings(2 * per_task)
    most = 2 * VALIDATION * (1 + rounds) + 2 * substitution.FEWEST * 4 * per_task
    assert asked <= most, "the work grows with the logarithm of the candidates"


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, True), ({"stand_ins": 0}, False), ({"kind": "static"}, False), ({"experts": ("one",)}, False)],
)
def test_nothing_is_looked_for_where_nothing_could_stand_in(changes: dict[str, Any], wanted: bool) -> None:
    assert substitution.wanted(Evaluator(**changes)) is wanted  # type: ignore[arg-type]
