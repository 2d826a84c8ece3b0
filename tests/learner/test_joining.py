"""Real updates of a learner with a new expert: all else of the router stays as it was, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experts.joining import is_of
from experts.state import Arrays, take_arrays
from learner.learner import LearnerRank
from tests.learner.world import World, encode, prompts, update

pytestmark = pytest.mark.usefixtures("deepspeed_alone")
NEW = 1  # "right", of the world's two experts
HARD = {"weight_decay": 0.3, "clip": 0.01}


@pytest.fixture
def joining(world: World) -> World:
    """The world, in which the expert `right` is new."""
    router = world.router.model_copy(update={"init": "somewhere", "add_expert": ("right",)})
    return replace(world, router=router)


def moved(before: Arrays, after: Arrays) -> set[str]:
    """Names of arrays that are not the same bytes."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def advance(world: World, rank: LearnerRank, steps: range) -> None:
    """Some updates on groups of the rank's own router."""
    for step in steps:
        update(rank, world.scored(prompts(3, start=3 * step), rank.snapshot()))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_else_stays_bit_for_bit_through_updates_and_resumes(joining: World, stage: int) -> None:
    settings = {"zero_stage": stage, **HARD}
    first = joining.learner(learner=settings)
    start = take_arrays(first.engine.module)
    saved = {name: array + np.float32(0.01) for name, array in start.items()}
    first.start_from(saved)
    advance(joining, first, range(2))
    own = {name for name in saved if is_of(name, [NEW])}
    assert moved(saved, first.snapshot().arrays) == own == {"project.1.weight", "project.1.bias", "expert_embedding.1"}
    state = first.state()
    assert set(state.optimizer.moments["exp_avg"]) == own
    held = first.trainable()
    assert held["optimised"] == sum(saved[name].size for name in own) < held["router"]
    second = joining.learner(learner=settings)
    second.restore(state, 1)
    for rank in (first, second):
        advance(joining, rank, range(2, 4))
    assert moved(saved, second.snapshot().arrays) == own
    assert second.snapshot().checksum == first.snapshot().checksum


def test_without_a_new_expert_the_same_updates_move_everything(world: World) -> None:
    rank = world.learner(learner=HARD)
    before = rank.snapshot().arrays
    advance(world, rank, range(2))
    assert moved(before, rank.snapshot().arrays) >= {"latents", "project.0.weight", "project.1.weight", "key.weight"}


def test_a_rank_fits_new_experts_to_a_router_and_stays_as_it_is(joining: World) -> None:
    rank = joining.learner()
    before = rank.snapshot().arrays
    made = rank.add_experts(before, *encode(prompts(40))).arrays
    assert moved(before, made) == {"project.1.weight", "project.1.bias", "expert_embedding.1"}
    assert not moved(before, take_arrays(rank.engine.module))
