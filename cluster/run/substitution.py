"""Looks for stand-ins: states of training prompts that replace those of an expert that is away.

A prompt that needs the expert is lost without it, whatever stands there; the others are answered as before when the
router takes the stand-in for an expert that has nothing to say.  Which states do that is a question to the router: each
candidate answers validation prompts, by successive halving (arXiv 1502.07943), so that twice the candidates cost
little more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.run.evaluate import Evaluator
from cluster.run.fleet import Fleet, Reference
from cluster.watch.results import Result
from experts.expert import whole
from experts.router import router_class
from experts.standins import StandIns

FEWEST = 8  # validation prompts a task, in the first round


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
        """Whether the stand-in is worth having."""
        return self.stood_in["mean"] > self.hidden["mean"]


@dataclass(frozen=True)
class Found:
    """What was found for one router.  whole: how it answers with all experts; without: by expert."""

    whole: Result
    without: Mapping[str, Without]

    def stand_ins(self, checksum: str) -> StandIns:
        """Those that are worth having.  checksum: of the router."""
        return StandIns(checksum, {name: each.state for name, each in self.without.items() if each.helps})

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


def wanted(evaluator: Evaluator) -> bool:
    """Whether stand-ins are asked for, and can be: the router reads states, and of more than one expert."""
    config = evaluator.config
    reads = getattr(router_class(config.router.kind), "asks", "states") == "states"
    return bool(config.evaluation.stand_ins) and reads and len(evaluator.experts) > 1


async def find(evaluator: Evaluator, fleet: Fleet, router: Reference) -> Found:
    """The best stand-in for every expert; see `wanted`."""
    config = evaluator.config.evaluation
    examples = evaluator.prompts("train", config.stand_ins)
    stages = fleet.encode(examples)
    asked = [stage.reference for stage in stages]
    states = whole(await fleet.get_all(asked, "states for stand-ins", stages=stages))
    most = config.validation_prompts
    everything = await _answered(evaluator, fleet, router, most)
    without = {}
    for place, (name, mine) in enumerate(zip(evaluator.experts, states, strict=True)):
        best, result = await _best(evaluator, fleet, router, place, mine.features, most)
        hidden = await _answered(evaluator, fleet, router, most, hidden=(place,))
        without[name] = Without(hidden, result, examples[best].task, mine.features[best])
    return Found(everything, without)


async def _best(
    evaluator: Evaluator, fleet: Fleet, router: Reference, place: int, candidates: Sequence[np.ndarray], most: int
) -> tuple[int, Result]:
    """The candidate that does best in an expert's place, and how well, on all validation prompts."""
    left, rounds = list(range(len(candidates))), halvings(len(candidates))
    for later in reversed(range(rounds)):
        prompts = min(most, max(FEWEST, most >> later))
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
