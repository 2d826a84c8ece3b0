"""The ratio, its clip and the correction for the engine, on real updates and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.algorithms import TokenBatch, build_algorithm
from learner.config import AlgorithmConfig
from learner.losses import Denominators, clamped_log_ratio, clipped_surrogate, engine_correction, k3, token_weights
from tests.learner.gradient_cases import at_version_one
from tests.learner.world import backward, flat, prompts


@pytest.fixture(scope="module")
def fresh(world, deepspeed_alone):
    """A function that makes a lone rank whose clip would act on any token that moved."""
    return lambda **settings: world.learner(eps_low=1e-9, eps_high=1e-9, kl={"reference": "none"}, **settings)


def test_the_ratio_is_exactly_one_and_the_clip_inert_without_staleness(world, fresh):
    """Even a clip range of nothing changes nothing: bit for bit the gradient of a wide one."""
    found = []
    for settings in ({}, {"eps_low": 0.9, "eps_high": 9.0}):
        learner = fresh()
        learner.gradient.algorithm = build_algorithm(learner.spec.algorithm.model_copy(update=settings))
        sums = backward(learner, world.scored(prompts(5), learner.snapshot()).groups)
        assert sums.values["ratio"] == sums.values["tokens"]
        assert sums.values["clipped"] == 0
        found.append(flat(learner.engine.gradients()))
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_the_clip_acts_on_a_stale_group(world, fresh):
    learner = fresh(staleness=1)
    groups = world.scored(prompts(5), learner.snapshot()).groups
    learner.restore(at_version_one(learner), 0)
    sums = backward(learner, groups)
    assert 0 < sums.values["clipped"] < sums.values["tokens"]
    assert sums.values["ratio"] != sums.values["tokens"]


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope", "acts"),
    [
        (1.0, 2.0, -2.0, False),
        (1.19, 2.0, -2.0, False),
        (1.31, 2.0, 0.0, True),
        (0.5, 2.0, -2.0, False),
        (0.89, -2.0, 0.0, True),
        (0.95, -2.0, 2.0, False),
        (9.0, -2.0, 2.0, False),
        (9.0, 0.0, 0.0, False),
    ],
)
def test_the_clip_stops_the_gradient_only_where_a_token_has_moved_the_right_way(ratio, advantage, slope, acts):
    x = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_surrogate(x, torch.tensor([advantage], dtype=torch.float64), 0.1, 0.3)
    loss.sum().backward()
    assert x.grad.item() == slope
    assert clipped.item() == acts


def test_the_correction_is_truncated_counted_and_detached():
    old = torch.log(torch.tensor([[0.1, 0.4, 0.9, 0.5]])).requires_grad_(True)
    sampler = torch.log(torch.tensor([[0.2, 0.4, 0.3, 0.5e-3]]))
    weight, acts = engine_correction(old, sampler, 2.0)
    assert weight.tolist()[0] == pytest.approx([0.5, 1.0, 2.0, 2.0])
    assert acts.tolist() == [[False, False, True, True]]
    assert not weight.requires_grad


def test_a_cap_of_zero_switches_the_correction_off():
    weight, acts = engine_correction(torch.zeros(1, 2), torch.full((1, 2), -3.0), 0.0)
    assert weight.tolist() == [[1.0, 1.0]]
    assert not acts.any()


def test_an_engine_that_disagrees_is_corrected_in_a_real_update(world, fresh):
    """The engine claims half the probability for every token of one group: weights of 2, cut to C."""
    learner = fresh()
    groups = world.scored(prompts(2), learner.snapshot()).groups
    lied = [replace(c, logprobs=(c.logprobs - np.log(2.0)).astype(np.float32)) for c in groups[0].completions]
    sums = {}
    for cap in (1.5, 0.0):
        learner.gradient.algorithm = build_algorithm(learner.spec.algorithm.model_copy(update={"correction_cap": cap}))
        sums[cap] = backward(learner, [replace(groups[0], completions=tuple(lied)), groups[1]]).values
    assert sums[1.5]["corrected"] == sum(len(c.tokens) for c in lied)
    assert sums[0.0]["corrected"] == 0
    assert sums[1.5]["mismatch"] == pytest.approx(np.log(2.0) * sums[1.5]["corrected"], rel=1e-4)


@pytest.mark.parametrize("estimator", ["k3", "k1_reward"])
def test_log_ratios_are_clamped_and_counted(estimator):
    far = torch.tensor([[-50.0, -1.0]], dtype=torch.float64)
    near = torch.full((1, 2), -1.0, dtype=torch.float64)
    assert clamped_log_ratio(near, far)[0].tolist() == [[20.0, 0.0]]
    assert k3(far, near)[0][0, 0].item() == pytest.approx(np.exp(20.0) - 21.0)
    config = AlgorithmConfig.model_validate({"kind": "dr_grpo", "kl": {"coefficient": 1.0, "estimator": estimator}})
    rows = torch.cat([near, near])
    batch = TokenBatch(
        rows,
        rows,
        rows,
        torch.cat([far, near]),
        torch.zeros(1, 2, dtype=torch.float64),
        torch.ones(1, 2, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.bool),
    )
    terms = build_algorithm(config).loss(batch, Denominators(2, 4))
    assert terms.kl_clamped.tolist() == [[True, False], [False, False]]
    assert terms.advantages.tolist() == ([[-10.0, 10.0]] if estimator == "k1_reward" else [[0.0, 0.0]])


def test_weights_of_an_update_add_up():
    """Each aggregation by hand, and shares of micro-batches add up to the whole."""
    valid = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    denominators = Denominators(completions=2, tokens=4, constant_length=5)
    wanted = {
        "sequence": [[1 / 6] * 3, [1 / 2, 0, 0], [0] * 3],
        "token": [[1 / 4] * 3, [1 / 4, 0, 0], [0] * 3],
        "constant": [[1 / 10] * 3, [1 / 10, 0, 0], [0] * 3],
    }
    for how, rows in wanted.items():
        whole = token_weights(valid, how, denominators)
        torch.testing.assert_close(whole, torch.tensor(rows, dtype=torch.float64))
        parts = [token_weights(valid[i : i + 1], how, denominators) for i in range(3)]
        assert torch.equal(torch.cat(parts), whole)
