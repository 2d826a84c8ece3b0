"""What the engine sampled under, against what the learner computes for it; other prefixes are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from experts.state import build_router, put_arrays, stack_features
from learner.batch import global_denominators
from learner.engine import Rendezvous
from learner.learner import LearnerError, LearnerRank
from learner.logprobs import completion_logprobs
from rollout.sequence import lay_out_completions, lay_out_prompts
from rollout.types import Draws
from tests.learner.world import World, backward, encode, prompts, router_config, update

TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("deepspeed_alone")


@pytest.fixture(scope="module")
def learner(world):
    """A lone rank with a fresh router."""
    return world.learner()


@pytest.mark.parametrize("position", ["front", "after_bos"])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt_neox"])
def test_engine_and_learner_agree(policies, family, position):
    world = World.of(policies[family], router_config(position))
    some = prompts(5)
    router = world.learner().snapshot()
    module = build_router(world.router, world.shape, world.worker.policy)
    put_arrays(module, router.arrays)
    with torch.no_grad():
        prefix = module(stack_features([e.features for e in encode(some)]), torch.ones(5, 2, dtype=torch.bool)).prefix
    for temperature in (0.7, 1.0, 1.3):
        groups = world.roll(some, router, temperature).groups
        policy = world.worker.policy
        laid = lay_out_prompts([g.prompt_tokens for g in groups], 3, policy.pad_id, position)
        assert len({len(g.prompt_tokens) for g in groups}) > 2
        completions = lay_out_completions(laid, [[c.tokens for c in g.completions] for g in groups], policy.pad_id)
        with torch.no_grad():
            found = completion_logprobs(policy, laid, prefix, completions, temperature).logprobs
        said = np.concatenate([c.logprobs for g in groups for c in g.completions])
        assert np.abs(found[completions.valid].numpy() - said).max() < TOLERANCE


@pytest.mark.parametrize("position", ["front", "after_bos"])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_expert_dropout_is_repeated_exactly(policies, position, temperature):
    world = World.of(policies["qwen2"], router_config(position, dropout=0.5))
    learner = world.learner()
    rollout = world.scored(prompts(7), learner.snapshot(), temperature=temperature)
    masks = np.stack([g.draws.expert_mask for g in rollout.groups])
    assert 0 < (~masks).sum() < masks.size
    sums = update(learner, rollout).sums
    assert sums.mismatch_max < TOLERANCE
    assert sums.mean("ratio") == pytest.approx(1.0, abs=1e-6)


def refusal(learner, groups, seed: int = 7) -> str:
    """The learner's reason."""
    with pytest.raises(LearnerError) as caught:
        backward(learner, groups, seed)
    return str(caught.value)


@pytest.fixture(scope="module", params=["near_zero", "tiny", "anchored"])
def ready(request, world):
    """A rank and groups for it, for prefixes that start from nothing much or from anchors."""
    prefix = {
        "near_zero": {},
        "tiny": {"scale": 1e-3},
        "anchored": {"scale": 1e-3, "init": "anchored", "anchor_tokens": (5, 6, 7)},
    }[request.param]
    here = World.of(world.policy, router_config(**prefix))
    learner = here.learner()
    return learner, here.scored(prompts(3), learner.snapshot()).groups


def test_other_features_are_refused(ready):
    learner, groups = ready
    assert "prompt 0: its prefix does not match" in refusal(learner, groups, seed=8)


def test_other_draws_are_refused(ready):
    learner, groups = ready
    forged = replace(groups[1], draws=Draws(expert_mask=np.array([True, False])))
    assert "prompt 1: its prefix does not match" in refusal(learner, [groups[0], forged, groups[2]])


def test_another_checksum_is_refused(ready):
    learner, groups = ready
    forged = replace(groups[2], router=replace(groups[2].router, checksum="0" * 32))
    assert "prompt 2: its prefix does not match" in refusal(learner, [*groups[:2], forged])


def test_a_group_sampled_without_a_prefix_is_refused(ready):
    learner, groups = ready
    forged = replace(groups[0], prefix_sketch=np.zeros(0, np.float32))
    assert "prompt 0: its prefix does not match" in refusal(learner, [forged])


@pytest.mark.parametrize(("dtype", "accepted"), [("bfloat16", True), ("float32", False)])
def test_features_made_again_in_half_precision_pass_where_experts_have_it(world, dtype, accepted):
    learner = LearnerRank(replace(world.spec(), experts_dtypes=("float32", dtype)), Rendezvous())
    groups = world.scored(prompts(3), learner.snapshot()).groups
    noise = np.random.default_rng(0)
    rounded = [
        [feature * (1 + 0.02 * noise.standard_normal(feature.shape, dtype=np.float32)) for feature in e.features]
        for e in encode([g.prompt for g in groups], 7)
    ]

    def again() -> None:
        learner.backward(groups, rounded, global_denominators(groups, learner.spec.algorithm.constant_length))

    if accepted:
        again()
        assert "prompt 0: its prefix does not match" in refusal(learner, groups, seed=8)
    else:
        with pytest.raises(LearnerError, match="its prefix does not match"):
            again()


def test_what_is_not_tampered_with_passes(ready):
    learner, groups = ready
    assert backward(learner, groups).mean("tokens") == 1.0
