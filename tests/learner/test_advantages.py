"""Advantages: no signal gives exactly 0, and a masked completion might as well not exist."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.advantages import NO_SIGNAL, centered, has_signal, leave_one_out, normalised, spread
from rollout.types import RewardStatus

KINDS = [normalised, centered, leave_one_out]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda f: f.__name__)

values = st.floats(-10, 10, allow_nan=False, width=32)
rows = st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=8)


def of(kind, rewards: list[float], ok: list[bool] | None = None) -> Tensor:
    """One group's advantages, in float64."""
    mask = torch.tensor([ok or [True] * len(rewards)])
    return kind(torch.tensor([rewards], dtype=torch.float64), mask)[0]


@kinds
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7, 1e8])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_give_exactly_zero(kind, reward, size):
    assert of(kind, [reward] * size).tolist() == [0.0] * size


@kinds
def test_rewards_nearer_than_the_threshold_give_exactly_zero(kind):
    assert of(kind, [0.5, 0.5 + 0.9 * NO_SIGNAL, 0.5]).tolist() == [0.0] * 3
    assert of(kind, [0.5, 0.5 + 1.1 * NO_SIGNAL, 0.5]).abs().min() > 0


@kinds
def test_one_ok_completion_has_nothing_to_be_compared_with(kind):
    assert of(kind, [1.0, 0.0, 5.0], [False, True, False]).tolist() == [0.0] * 3


@kinds
def test_a_group_without_any_ok_completion_is_zero(kind):
    assert of(kind, [1.0, 0.0], [False, False]).tolist() == [0.0] * 2
    assert spread(torch.tensor([[1.0, 0.0]]), torch.tensor([[False, False]])).tolist() == [0.0]


near = st.sampled_from([0.0, 1.0, 1.0 + 0.5 * NO_SIGNAL, 1.0 + NO_SIGNAL, 1.0 + 2 * NO_SIGNAL, float("nan")])
status = st.sampled_from(list(RewardStatus))


@kinds
@given(row=st.lists(st.tuples(near | values, status), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_group_has_a_signal_just_when_its_advantages_are_not_all_zero(kind, row):
    """Rewards at the threshold among them, and junk where the verifier failed."""
    row = [(0.0 if s is RewardStatus.OK and r != r else r, s) for r, s in row]
    rewards, statuses = [r for r, _ in row], [s for _, s in row]
    found = of(kind, rewards, [s is RewardStatus.OK for s in statuses])
    assert has_signal(rewards, statuses) == bool((found != 0).any())


def test_an_empty_group_has_no_signal():
    assert not has_signal([], [])
    assert not has_signal([1.0, 0.0], [RewardStatus.TIMEOUT, RewardStatus.OK])
    assert has_signal([1.0, 0.0], [RewardStatus.OK, RewardStatus.OK])


def test_the_threshold_holds_for_each_group_alone():
    found = normalised(torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool))
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])


def test_the_standard_deviation_has_ddof_one():
    rewards = [0.0, 1.0, 4.0]
    wanted = [(r - statistics.mean(rewards)) / statistics.stdev(rewards) for r in rewards]
    assert of(normalised, rewards).tolist() == pytest.approx(wanted, abs=1e-14)


def test_dr_grpo_only_centers():
    assert of(centered, [0.0, 1.0, 5.0]).tolist() == pytest.approx([-2.0, -1.0, 3.0], abs=1e-14)


def test_rloo_leaves_each_completion_out_of_its_own_baseline():
    assert of(leave_one_out, [0.0, 1.0, 5.0]).tolist() == pytest.approx([0 - 3.0, 1 - 2.5, 5 - 0.5], abs=1e-14)


@kinds
@given(row=rows)
@settings(max_examples=60, deadline=None)
def test_masked_completions_leave_mean_and_deviation(kind, row):
    """The others' advantages are those of the group without it, and its own is 0."""
    rewards, ok = [r for r, _ in row], [m for _, m in row]
    found = of(kind, rewards, ok)
    kept = [r for r, m in row if m]
    alone = of(kind, kept).tolist() if kept else []
    assert found[torch.tensor(ok)].tolist() == pytest.approx(alone, rel=1e-9, abs=1e-9)
    assert found[~torch.tensor(ok)].abs().sum() == 0


@kinds
@given(row=rows, junk=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]))
@settings(max_examples=60, deadline=None)
def test_a_masked_reward_never_matters(kind, row, junk):
    ok = [m for _, m in row]
    clean = of(kind, [r if m else 0.0 for r, m in row], ok)
    assert torch.equal(of(kind, [r if m else junk for r, m in row], ok), clean)


@kinds
@given(row=rows, shift=st.integers(-8, 8))
@settings(max_examples=60, deadline=None)
def test_a_shift_of_all_rewards_changes_nothing(kind, row, shift):
    ok = [m for _, m in row]
    # Multiples of 1/64: the shift is exact, so the spread cannot cross the threshold by rounding.
    exact = [round(r * 64) / 64 for r, _ in row]
    plain, shifted = of(kind, exact, ok), of(kind, [r + shift for r in exact], ok)
    assert shifted.tolist() == pytest.approx(plain.tolist(), rel=1e-9, abs=1e-9)


@given(row=rows, scale=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_grpo_forgets_the_scale_of_rewards_and_sums_to_zero(row, scale):
    ok = [m for _, m in row]
    exact = [round(r * 64) / 64 for r, _ in row]
    plain, scaled = of(normalised, exact, ok), of(normalised, [r * scale for r in exact], ok)
    assert scaled.tolist() == pytest.approx(plain.tolist(), rel=1e-9, abs=1e-9)
    assert plain.sum().item() == pytest.approx(0.0, abs=1e-9)
