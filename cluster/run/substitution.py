"""Looks for stand-ins: states of training prompts that replace those of an expert that is away.

A prompt that needs the expert is lost without it, whatever stands there; the others are answered as before when the
router takes the stand-in for an expert that has nothing to say.  Which states do that is a question to the router: each
candidate answers validation prompts, by successive halving (arXiv 1502.07943): every round asks half of the candidates
about twice the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.run.evaluate import Evaluator
from cluster.run.fleet import Fleet, Reference
from cluster.watch.intervals import paired_bootstrap
from cluster.watch.results import Result
from experts.expert import whole
from experts.router import router_class
from experts.standins import States
from rollout.types import Prompt

ENOUGH = 150  # validation prompts of all tasks together, so that the search costs as much for many tasks as for few


@dataclass(frozen=True)
class Without:
    """How the router answers without an expert, on validation prompts.

    hidden: with nothing in its place.  stood_in: with the best stand-in, a state of a prompt of this task.
    """

    hidden: Result
    stood_in: Result
    task: str
    state: np.ndarray

    @property
    def helps(self) -> bool:
        """Whether the stand-in is worth having: by luck alone, the best of several is better than nothing."""
        ours, others = (list(result["outcomes"].values()) for result in (self.stood_in, self.hidden))
        return paired_bootstrap(ours, others).low > 0


@dataclass(frozen=True)
class Found:
    """What was found for one router.  whole: how it answers with all experts; without: by expert."""

    whole: Result
    without: Mapping[str, Without]

    @property
    def stand_ins(self) -> States:
        """Those that are worth having."""
        return {name: each.state for name, each in self.without.items() if each.helps}

    def as_data(self) -> dict[str, Any]:
        """As plain data, for `summary.json`: accuracies by task on validation prompts."""
        return {
            "whole": _accuracies(self.whole),
            "without": {
                name: {
                    "hidden": _accuracies(each.hidden),
                    "stood_in": _accuracies(each.stood_in),
                    "task": each.task,
                    "used": each.helps,
                }
                for name, each in self.without.items()
            },
        }


def possible(evaluator: Evaluator) -> bool:
    """Whether there can be any: the router reads the states of these prompts, and of more than one expert, and every
    task has validation prompts."""
    router = evaluator.config.router
    reads = getattr(router_class(router.kind), "asks", "states") == "states" and router.states == "own"
    judged = len(evaluator.prompts("validation", 1)) == len(evaluator.tasks)
    return reads and judged and len(evaluator.experts) > 1


async def find(evaluator: Evaluator, fleet: Fleet, router: Reference, candidates: int) -> Found:
    """The best stand-in for every expert, where there can be any.

    candidates: training prompts whose states are tried.
    """
    examples = spread(evaluator, candidates)
    # They are no part of training, and in this company their last digits may be others.
    stages = fleet.states(examples, keep=False)
    asked = [stage.reference for stage in stages]
    states = whole(await fleet.get_all(asked, "states for stand-ins", stages=stages))
    most = min(evaluator.config.evaluation.validation_prompts, max(1, ENOUGH // len(evaluator.tasks)))
    everything = await _answered(evaluator, fleet, router, most)
    without = {}
    for place, (name, mine) in enumerate(zip(evaluator.experts, states, strict=True)):
        best, result = await _best(evaluator, fleet, router, place, mine.features, most)
        hidden = await _answered(evaluator, fleet, router, most, hidden=(place,))
        without[name] = Without(hidden, result, examples[best].task, mine.features[best])
    return Found(everything, without)


def spread(evaluator: Evaluator, count: int) -> list[Prompt]:
    """So many training prompts, from as many tasks as there may be, in turn."""
    names = list(evaluator.tasks)
    chosen = names if len(names) <= count else [names[i * len(names) // count] for i in range(count)]
    by_task: dict[str, list[Prompt]] = {name: [] for name in chosen}
    for prompt in evaluator.prompts("train", -(-count // len(chosen))):
        if prompt.task in by_task:
            by_task[prompt.task].append(prompt)
    depth = max(map(len, by_task.values()))
    return [mine[row] for row in range(depth) for mine in by_task.values() if row < len(mine)][:count]


async def _best(
    evaluator: Evaluator, fleet: Fleet, router: Reference, place: int, candidates: Sequence[np.ndarray], most: int
) -> tuple[int, Result]:
    """The candidate that does best in an expert's place, and how well, on all validation prompts."""
    left = list(range(len(candidates)))
    for later in reversed(range(halvings(len(candidates)))):
        prompts = max(1, most >> later)
        results = {
            each: await _answered(evaluator, fleet, router, prompts, stand_ins={place: candidates[each]})
            for each in left
        }
        left = sorted(left, key=lambda each: -results[each]["mean"])[: (len(left) + 1) // 2]
    return left[0], results[left[0]]


def halvings(candidates: int) -> int:
    """Rounds until one is left; the last one has two, or one that never had company."""
    return max(1, (candidates - 1).bit_length())


async def _answered(evaluator: Evaluator, fleet: Fleet, router: Reference, prompts: int, **how: Any) -> Result:
    chosen = evaluator.prompts("validation", prompts)
    answered = await evaluator.answered(chosen, router, fleet.encode, **how)
    return evaluator.result(chosen, answered.outcomes)


def _accuracies(result: Result) -> dict[str, float]:
    return {**result["tasks"], "mean": result["mean"]}
