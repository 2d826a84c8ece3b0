"""The ratio, its clip and the correction for the engine, on real updates and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.algorithms import TokenBatch, build_algorithm
from learner.config import AlgorithmConfig
from learner.losses import (
    Denominators,
    clamped_log_ratio,
    clipped_surrogate,
    engine_weight,
    k3,
    masked_outside,
    sequence_ratio,
    token_weights,
    truncated,
    weighted_logprob,
)
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
    assert 0 < sums.values["clipped_completions"] < sums.values["completions"] == 20
    assert sums.values["ratio"] != sums.values["tokens"]


@pytest.mark.parametrize("kind", ["gspo", "cispo"])
def test_without_staleness_a_real_update_is_that_of_grpo(world, fresh, kind):
    found = []
    for settings in ({"kind": kind, "aggregation": "sequence"}, {}):
        learner = fresh(**settings)
        sums = backward(learner, world.scored(prompts(5), learner.snapshot()).groups)
        assert sums.values["clipped"] == 0
        found.append(flat(learner.engine.gradients()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6 * found[1].abs().max().item())


def test_gspo_clips_whole_completions_of_a_stale_group(world, fresh, monkeypatch):
    learner = fresh(staleness=1, kind="gspo")
    groups = world.scored(prompts(5), learner.snapshot()).groups
    learner.restore(at_version_one(learner), 0)
    seen, loss = [], learner.gradient.algorithm.loss

    def spy(batch, denominators):
        seen.append((batch.valid, loss(batch, denominators)))
        return seen[-1][1]

    monkeypatch.setattr(learner.gradient.algorithm, "loss", spy)
    sums = backward(learner, groups)
    rows = [row for valid, terms in seen for row in zip(valid, terms.clipped, strict=True)]
    assert all(clipped.equal(valid) or not clipped.any() for valid, clipped in rows)
    assert 0 < sums.values["clipped_completions"] < sums.values["completions"]
    assert sums.mean("clipped_completions", per="completions") == sum(bool(c.any()) for _, c in rows) / 20


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


def test_gspo_gives_every_token_the_completions_ratio_and_its_own_gradient():
    x = torch.tensor([[0.2, -0.6, 5.0], [0.3, 9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    ratio = sequence_ratio(x, torch.tensor([[True, True, False], [True, False, False]]))
    assert ratio[0, :2].tolist() == pytest.approx([np.exp(-0.2)] * 2)
    assert ratio[1, 0].item() == pytest.approx(np.exp(0.3))
    assert ratio[0, 0] == ratio[0, 1]
    ratio[0, 1].backward()
    assert x.grad.tolist() == [pytest.approx([0.0, np.exp(-0.2), 0.0]), [0.0] * 3]


def test_cispo_bounds_the_weight_and_keeps_every_tokens_gradient():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([[0.5, 1.1, 9.0]], dtype=torch.float64).expand(2, 3) * (logprobs.detach() / logprobs)
    loss, acts = weighted_logprob(logprobs, ratio, torch.tensor([2.0, 0.0], dtype=torch.float64), 0.2, 0.3)
    loss.sum().backward()
    assert logprobs.grad.tolist() == [pytest.approx([-1.6, -2.2, -2.6]), [0.0] * 3]
    assert acts.tolist() == [[True, False, True], [False] * 3]


def test_the_correction_is_truncated_or_masked_counted_and_detached():
    old = torch.log(torch.tensor([[0.1, 0.4, 0.9, 0.5, 0.1]])).requires_grad_(True)
    sampler = torch.log(torch.tensor([[0.2, 0.4, 0.3, 0.5e-3, 0.3]]))
    weight = engine_weight(old, sampler)
    assert not weight.requires_grad
    cut, acts = truncated(weight, 2.0)
    assert cut.tolist()[0] == pytest.approx([0.5, 1.0, 2.0, 2.0, 1 / 3])
    assert acts.tolist() == [[False, False, True, True, False]]
    left, masked = masked_outside(weight, 0.49, 5.0)
    assert left.tolist()[0] == pytest.approx([0.5, 1.0, 3.0, 0.0, 0.0])
    assert masked.tolist() == [[False, False, False, True, True]]


def test_an_engine_that_disagrees_is_corrected_in_a_real_update(world, fresh):
    """The engine claims half the probability for every token of one group: weights of 2, cut to C or masked."""
    learner = fresh()
    groups = world.scored(prompts(2), learner.snapshot()).groups
    lied = [replace(c, logprobs=(c.logprobs - np.log(2.0)).astype(np.float32)) for c in groups[0].completions]
    sums, gradients = {}, {}
    ways = {
        "tis": {"correction_cap": 1.5},
        "icepop": {"correction": "icepop", "icepop_high": 1.5},
        "none": {"correction": "none"},
    }
    for name, settings in ways.items():
        learner.gradient.algorithm = build_algorithm(learner.spec.algorithm.model_copy(update=settings))
        sums[name] = backward(learner, [replace(groups[0], completions=tuple(lied)), groups[1]]).values
        gradients[name] = flat(learner.engine.gradients())
    lies = sum(len(c.tokens) for c in lied)
    assert [sums[name]["corrected"] for name in ways] == [lies, lies, 0]
    assert sums["tis"]["mismatch"] == pytest.approx(np.log(2.0) * lies, rel=1e-4)
    # One group at weight 1, 1.5 and 0 beside one at weight 1: masking takes away and moves no denominator.
    torch.testing.assert_close(
        gradients["tis"] - gradients["none"],
        0.5 * (gradients["none"] - gradients["icepop"]),
        rtol=1e-3,
        atol=1e-5 * gradients["none"].abs().max().item(),
    )


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
