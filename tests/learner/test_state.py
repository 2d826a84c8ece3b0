"""Real updates: only the router trains, and a state goes on elsewhere as if nothing had happened."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.engine import OptimizerState
from learner.learner import LearnerError
from tests.learner.naive import load_double, naive_logprobs, prefix_of, router_of
from tests.learner.world import backward, batches_seen, flat, prompts, update

pytestmark = pytest.mark.usefixtures("deepspeed_alone")
stages = pytest.mark.parametrize("stage", [0, 1, 2])


def trained(world, updates: int, stage: int = 1, staleness: int = 0, **learner):
    """A lone rank after some updates."""
    rank = world.learner(staleness=staleness, learner={"zero_stage": stage, **learner})
    for step in range(updates):
        update(rank, world.scored(prompts(3, start=3 * step), rank.snapshot()))
    return rank


@stages
def test_only_the_router_trains(world, stage):
    rank = world.learner(learner={"zero_stage": stage})
    policy, before = rank.sha256(), rank.snapshot()
    assert policy == world.worker.sha256()
    for step in range(2):
        update(rank, world.scored(prompts(3, start=3 * step), rank.snapshot()))
    held = rank.trainable()
    assert held["optimised"] == held["router"] == sum(p.numel() for p in rank.engine.module.parameters())
    assert held["policy_with_gradient"] == []
    assert rank.sha256() == policy
    assert rank.snapshot().checksum != before.checksum
    moments = rank.state().optimizer.moments
    assert {name: a.shape for name, a in moments["exp_avg"].items()} == {
        name: tuple(p.shape) for name, p in rank.engine.module.named_parameters()
    }
    assert all(p.grad is None and not p.requires_grad for p in rank.policy.model.parameters())


@pytest.mark.parametrize(("wrote", "reads"), [(0, 1), (1, 2), (2, 0), (1, 1)])
def test_a_state_goes_on_bit_for_bit_at_any_stage(world, wrote, reads):
    first = trained(world, 2, wrote, staleness=1)
    state = first.state()
    second = world.learner(staleness=1, learner={"zero_stage": reads})
    second.restore(state, 4)
    assert sorted(second.history) == [1, 2]
    rollout = world.scored(prompts(3, start=9), first.snapshot())
    here, there = update(first, rollout), update(second, rollout)
    assert second.snapshot().checksum == first.snapshot().checksum
    assert there.grad_norm == pytest.approx(here.grad_norm, rel=1e-6)
    after = [rank.state().optimizer for rank in (first, second)]
    assert after[0].steps == after[1].steps == 3
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(flat(after[0].moments[key]), flat(after[1].moments[key]))
    assert (first.snapshot().incarnation, second.snapshot().incarnation) == (0, 4)


@stages
def test_a_used_learner_goes_back_to_its_very_beginning(world, stage):
    """Neither Adam's moments nor the gradients of an update that was broken off stay behind."""
    rank = world.learner(learner={"zero_stage": stage})
    start = rank.state()
    rollout = world.scored(prompts(3), rank.snapshot())
    update(rank, rollout)
    wanted = rank.snapshot().checksum
    update(rank, world.scored(prompts(3, start=3), rank.snapshot()))
    backward(rank, world.scored(prompts(3, start=6), rank.snapshot()).groups)
    rank.restore(start, 0)
    assert rank.snapshot().checksum == start.snapshot.checksum
    update(rank, rollout)
    assert rank.snapshot().checksum == wanted
    rank.start_from(start.snapshot.arrays)
    assert rank.state().optimizer.steps == 0
    update(rank, world.scored(prompts(3), rank.snapshot()))
    assert rank.snapshot().checksum == wanted


@stages
def test_a_clipped_norm_is_reported_before_the_clip(world, stage):
    rank = world.learner(learner={"clip": 1e-3, "zero_stage": stage})
    rollout = world.scored(prompts(3), rank.snapshot())
    backward(rank, rollout.groups)
    raw = flat(rank.engine.gradients()).norm().item()
    assert raw > 1e-2
    assert rank.finish_update() == pytest.approx(raw, rel=1e-5)


def test_history_keeps_one_router_more_than_the_staleness(world):
    rank = trained(world, 4, staleness=2)
    assert sorted(rank.history) == [2, 3, 4]
    assert rank.snapshot().version == 4
    assert len({s.checksum for s in rank.history.values()}) == 3
    assert sorted(trained(world, 2).history) == [2]


def test_old_log_probabilities_are_those_of_the_router_that_sampled(world, monkeypatch):
    """Groups of three versions in one update, against the slow way in float64."""
    rank = world.learner(staleness=2)
    groups = []
    for step in range(3):
        groups += world.scored(prompts(2, start=10 + 2 * step), rank.snapshot()).groups
        if step < 2:
            update(rank, world.scored(prompts(3), rank.snapshot()))
    policy = load_double(world.policy)
    moved = dict.fromkeys(range(3), 0.0)
    for some, batch in batches_seen(rank, groups, monkeypatch):
        for row, (group, completion) in enumerate((g, c) for g in some for c in g.completions):
            router = router_of(world, policy, rank.history[group.router.version].arrays)
            prefix, count = prefix_of(router, group), len(completion.tokens)
            with torch.no_grad():
                wanted = naive_logprobs(policy, group.prompt_tokens, prefix, completion.tokens, 1.0, "front")
            assert (batch.old[row, :count] - wanted).abs().max() < 1e-4
            apart = (batch.old - batch.logprobs.detach())[row, :count].abs().max().item()
            moved[group.router.version] = max(moved[group.router.version], apart)
    assert min(moved[0], moved[1]) > 1e-3
    assert moved[2] == 0


def test_a_group_older_than_kept_is_refused(world):
    rank = world.learner(staleness=1)
    groups = world.scored(prompts(2), rank.snapshot()).groups
    for step in range(2):
        backward(rank, groups)
        rank.finish_update()
        assert rank.version == step + 1
    with pytest.raises(LearnerError, match="version 0 came at version 2: older than kept"):
        backward(rank, groups)


def test_a_fresh_optimizer_state_is_empty(world):
    state = world.learner().state()
    assert state.optimizer == OptimizerState(0, {"exp_avg": {}, "exp_avg_sq": {}})
    assert np.array_equal(flat(state.initial), flat(state.snapshot.arrays))


def test_the_reference_is_the_frozen_policy_without_slots(world, monkeypatch):
    """`no_prefix` is no prefix at all, at the same temperature."""
    rank = world.learner()
    groups = world.scored(prompts(2), rank.snapshot(), temperature=1.3).groups
    policy = load_double(world.policy)
    for some, batch in batches_seen(rank, groups, monkeypatch):
        for row, (group, completion) in enumerate((g, c) for g in some for c in g.completions):
            wanted = naive_logprobs(policy, group.prompt_tokens, None, completion.tokens, 1.3, "front")
            assert (batch.reference[row, : len(wanted)] - wanted).abs().max() < 1e-4
