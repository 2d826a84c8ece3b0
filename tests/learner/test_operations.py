"""What an update and a rollout cost is the models' and the router's together."""

from __future__ import annotations

import pytest

from experts.expert import Encoded
from experts.operations import RouterOperations
from experts.state import build_router
from rollout.types import Group, Sampling
from tests.learner.gradient_cases import at_version_one
from tests.learner.world import TOKENS, WIDTHS, World, backward, encode, prompts

PROMPTS = 5


@pytest.fixture(scope="module")
def a_prefix(world: World) -> float:
    """What one forward pass of the world's router on all prompts costs."""
    router = build_router(world.router, world.shape, world.worker.policy, 0).requires_grad_(False)
    made = RouterOperations(router, len(WIDTHS), "cpu")(list(zip(TOKENS, WIDTHS, strict=True)), PROMPTS)
    assert made > 0
    return float(made)


def a_pass(world: World, groups: tuple[Group, ...], slots: int) -> float:
    """Of the policy over all tokens of these groups, a prompt and its prefix once for all its completions."""
    tokens = sum(slots + len(g.prompt_tokens) + sum(len(c.tokens) for c in g.completions) for g in groups)
    return 2.0 * world.worker.policy.parameters * tokens


@pytest.mark.parametrize(
    ("reference", "stale", "policys", "alone", "routers"),
    [
        ("none", False, 2, 0, 3),
        ("none", True, 3, 0, 4),
        ("initial_router", False, 3, 0, 4),
        ("no_prefix", False, 2, 1, 3),
    ],
)
def test_an_update_counts_every_pass(
    world: World,
    a_prefix: float,
    deepspeed_alone: None,
    reference: str,
    stale: bool,
    policys: int,
    alone: int,
    routers: int,
) -> None:
    learner = world.learner(staleness=1, kl={"reference": reference, "coefficient": 0.1})
    groups = world.scored(prompts(PROMPTS), learner.snapshot()).groups
    if stale:
        learner.restore(at_version_one(learner), 0)
    spent = backward(learner, groups).values["operations"]
    passes = policys * a_pass(world, groups, world.router.latents) + alone * a_pass(world, groups, 0)
    assert spent == pytest.approx(passes + routers * a_prefix, rel=1e-9)


def test_a_rollout_counts_the_prefix_it_makes(world: World, a_prefix: float, deepspeed_alone: None) -> None:
    some, sampling = prompts(PROMPTS), Sampling(temperature=1.0, max_new_tokens=6, samples=4)
    snapshot = world.learner().snapshot()

    def cost(*encoded: Encoded, alone: bool) -> float:
        made = world.worker.generate(some, sampling, snapshot, *encoded, alone=alone)
        return made.operations.policy - a_pass(world, made.groups, 0 if alone else world.router.latents)

    assert cost(*encode(some), alone=False) == pytest.approx(a_prefix)
    assert cost(alone=True) == pytest.approx(0.0, abs=1e-3)
