"""The expected gradient of the code, all groups enumerated, against the objectives of docs/mathematics.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from learner.advantages import has_signal
from learner.config import AlgorithmConfig
from learner.losses import weighted_logprob
from rollout.types import RewardStatus
from tests.learner.enumeration import (
    BETA,
    LENGTH,
    REWARDS,
    VALID,
    Setting,
    code_gradient,
    gradient_of,
    groups,
    logprobs,
    mean_reward,
    parameters,
    published_gspo,
    relative_error,
    sequence_kl,
    token_kl,
    whole,
    written,
)

EXACT = 1e-11
ALGORITHMS = ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo"]
ESTIMATORS = ["none", "k3", "k3_weighted", "k1_reward"]
AGGREGATIONS = ["sequence", "token", "constant"]
THETA = parameters(0)
REFERENCE = parameters(1, THETA, 0.8)
OLD = parameters(2, parameters(3, THETA, -0.03), -0.03)  # two small updates before THETA
NEAR, FAR = parameters(4, OLD, 0.1), parameters(4, OLD, 0.5)

every_algorithm = pytest.mark.parametrize("kind", ALGORITHMS)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def config(kind: str, estimator: str = "none", aggregation: str = "constant", **settings: Any) -> AlgorithmConfig:
    """An algorithm's settings; a large KL coefficient, so that the term matters, and a wide clip also for GSPO."""
    kl = {"reference": "none"} if estimator == "none" else {"estimator": estimator, "coefficient": BETA}
    given: dict[str, Any] = {"kind": kind, "aggregation": aggregation, "kl": kl, "dynamic_sampling": False}
    if aggregation == "constant":
        given["constant_length"] = LENGTH
    if kind == "gspo":
        given |= {"eps_low": 0.2, "eps_high": 0.2}
    return AlgorithmConfig.model_validate(given | settings)


def on_policy(**settings: Any) -> Setting:
    """Everything sampled by the router being trained."""
    return Setting(THETA, THETA, THETA, REFERENCE, **settings)


@every_aggregation
@every_estimator
@every_algorithm
def test_on_policy_gradient_is_that_of_the_objective(kind, estimator, aggregation):
    how = config(kind, estimator, aggregation)
    found, clipped, corrected = code_gradient(how, on_policy())
    assert not clipped
    assert not corrected
    assert relative_error(found, written(how, on_policy())) < EXACT


ICEPOP = {"correction": "icepop", "icepop_low": 0.8, "icepop_high": 1.3}


@pytest.mark.parametrize(
    ("sampler", "correction", "acts"),
    [
        (OLD, {}, False),
        (NEAR, {}, False),
        (FAR, {"correction_cap": 1.1}, True),
        (FAR, ICEPOP, True),
        (NEAR, {"correction": "none"}, False),
    ],
    ids=["same", "engine", "truncated", "masked", "off"],
)
@every_estimator
@every_algorithm
def test_stale_gradient_is_that_of_the_objective(kind, estimator, sampler, correction, acts):
    """Two versions old; the sampling engine agrees, differs, hits the cap, is masked, or goes uncorrected."""
    how = config(kind, estimator, "sequence", **correction)
    setting = Setting(THETA, OLD, sampler, REFERENCE)
    found, clipped, corrected = code_gradient(how, setting)
    assert not clipped
    assert corrected == acts
    assert relative_error(found, written(how, setting)) < EXACT


@every_algorithm
def test_the_clip_acts_on_what_has_moved_far_enough(kind):
    how = config(kind, "k3_weighted", eps_low=0.02, eps_high=0.03)
    setting = Setting(THETA, OLD, NEAR, REFERENCE)
    found, clipped, _ = code_gradient(how, setting)
    assert clipped
    assert relative_error(found, written(how, setting, clip=True)) < EXACT
    assert relative_error(found, written(how, setting)) > 1e-3


@pytest.mark.parametrize(("eps", "acts"), [(0.2, False), (0.02, True)], ids=["wide", "narrow"])
def test_gspo_is_the_published_objective(eps, acts):
    how = config("gspo", aggregation="sequence", eps_low=eps, eps_high=eps)
    setting = Setting(THETA, OLD, OLD, REFERENCE)
    found, clipped, _ = code_gradient(how, setting)
    assert clipped == acts
    assert relative_error(found, published_gspo(how, setting)) < EXACT


@every_aggregation
@pytest.mark.parametrize("kind", ["dapo", "gspo", "cispo"])
def test_on_policy_all_normalised_algorithms_are_grpo(kind, aggregation):
    """They differ in what they do with a ratio, and it is 1."""
    found, *_ = code_gradient(config(kind, aggregation=aggregation), on_policy())
    wanted, *_ = code_gradient(config("grpo", aggregation=aggregation), on_policy())
    assert relative_error(found, wanted) < EXACT


def test_off_policy_gspo_counts_completions_as_often_as_the_sampler_wrote_them():
    """The stated bias: the root of the ratio is no importance weight, so GRPO's objective is not GSPO's."""
    setting = Setting(THETA, OLD, OLD, REFERENCE)
    found, wanted = (code_gradient(config(kind), setting)[0] for kind in ("gspo", "grpo"))
    assert relative_error(found, wanted) > 1e-3


def test_off_policy_cispo_is_grpo_until_the_clip_acts():
    setting = Setting(THETA, OLD, NEAR, REFERENCE)
    found, wanted = (code_gradient(config(kind), setting)[0] for kind in ("cispo", "grpo"))
    assert relative_error(found, wanted) < EXACT


@pytest.mark.parametrize(("eps", "neutral"), [(0.9, True), (0.02, False)], ids=["wide", "narrow"])
def test_cispo_makes_a_baseline_matter_where_the_clip_acts(eps, neutral):
    """The stated bias: with every completion worth the same there should be nothing to learn."""

    def objective(theta: torch.Tensor) -> torch.Tensor:
        mine, old = logprobs(theta), logprobs(OLD)
        same = torch.ones(len(mine), dtype=torch.float64)
        loss, acts = weighted_logprob(mine, (mine - old).exp(), same, eps, eps)
        assert bool((acts & VALID).any()) != neutral
        return (torch.where(VALID, loss, 0.0).sum(dim=1) * whole(old.exp())).sum()

    assert (gradient_of(objective, THETA).abs().max() < EXACT) == neutral


@every_algorithm
def test_dropping_groups_without_signal_changes_the_scale_alone(kind):
    """Without a KL term: what is dropped had no gradient, and prompts count alike however often they are dropped."""
    statuses = [RewardStatus.OK] * 3
    kept = torch.tensor([has_signal(row, statuses) for row in REWARDS[groups(3)].tolist()])
    setting = Setting(THETA, OLD, OLD, REFERENCE)
    how = config(kind, aggregation="sequence")
    chance = whole(logprobs(OLD).exp())[groups(3)].prod(dim=1)
    found, *_ = code_gradient(how, setting, kept)
    everything, *_ = code_gradient(how, setting)
    assert 0 < kept.sum() < len(kept)
    assert relative_error(found * chance[kept].sum(), everything) < EXACT


@pytest.mark.parametrize("samples", [2, 3])
def test_rloo_is_unbiased(samples):
    found, *_ = code_gradient(config("rloo"), on_policy(samples=samples))
    assert relative_error(found, -gradient_of(mean_reward, THETA) / LENGTH) < EXACT


@pytest.mark.parametrize("samples", [2, 3])
def test_dr_grpo_is_short_by_a_known_factor(samples):
    found, *_ = code_gradient(config("dr_grpo"), on_policy(samples=samples))
    wanted = -gradient_of(mean_reward, THETA) / LENGTH * (samples - 1) / samples
    assert relative_error(found, wanted) < EXACT


def test_grpo_forgets_how_much_a_prompt_has_to_offer():
    """The stated bias of the division by the deviation: ten times the reward, the same gradient."""
    small, _, _ = code_gradient(config("grpo"), on_policy())
    large, _, _ = code_gradient(config("grpo"), on_policy(rewards=10 * REWARDS))
    assert relative_error(large, small) < EXACT
    honest = -gradient_of(mean_reward, THETA) / LENGTH
    scale = (small * honest).sum() / honest.pow(2).sum()
    assert relative_error(small, scale * honest) > 1e-2


@every_aggregation
def test_only_constant_aggregation_weighs_completions_of_all_lengths_alike(aggregation):
    found, *_ = code_gradient(config("rloo", aggregation=aggregation), on_policy())
    honest = -gradient_of(mean_reward, THETA)
    scale = (found * honest).sum() / honest.pow(2).sum()
    error = relative_error(found, scale * honest)
    assert (error < EXACT) == (aggregation == "constant")


def penalty(estimator: str, setting: Setting) -> torch.Tensor:
    """The KL term's gradient alone: no completion is better than another."""
    silent = Setting(setting.theta, setting.old, setting.sampler, setting.reference, rewards=torch.zeros_like(REWARDS))
    return code_gradient(config("rloo", estimator), silent)[0] * LENGTH / BETA


def test_on_policy_k3_pulls_with_the_gradient_of_the_other_direction():
    """The stated bias: its value estimates KL(policy || reference), its gradient that of KL(reference || policy)."""
    found = penalty("k3", on_policy())
    other = gradient_of(lambda theta: token_kl(REFERENCE, theta, THETA), THETA)
    assert relative_error(found, other) < EXACT
    assert relative_error(found, gradient_of(lambda theta: token_kl(theta, REFERENCE, THETA), THETA)) > 1e-2


def test_off_policy_k3_is_weighed_by_the_sampler():
    found = penalty("k3", Setting(THETA, OLD, OLD, REFERENCE))
    visits = torch.cat([torch.ones(1, dtype=torch.float64), OLD.softmax(dim=1)[0, :3]])

    def sampled(theta: torch.Tensor) -> torch.Tensor:
        log = REFERENCE.log_softmax(dim=1) - theta.log_softmax(dim=1)
        return (visits * (OLD.softmax(dim=1) * (log.exp() - 1 - log)).sum(dim=1)).sum()

    assert relative_error(found, gradient_of(sampled, THETA)) < EXACT
    assert relative_error(found, gradient_of(lambda theta: token_kl(REFERENCE, theta, OLD), THETA)) > 1e-3


@pytest.mark.parametrize("old, sampler", [(THETA, THETA), (OLD, OLD), (OLD, NEAR)], ids=["fresh", "stale", "engine"])
def test_weighted_k3_is_the_token_kl_in_the_states_of_the_sampler(old, sampler):
    found = penalty("k3_weighted", Setting(THETA, old, sampler, REFERENCE))
    wanted = gradient_of(lambda theta: token_kl(theta, REFERENCE, sampler), THETA)
    assert relative_error(found, wanted) < EXACT


def test_k1_in_the_reward_is_the_kl_of_whole_completions():
    found, *_ = code_gradient(config("rloo", "k1_reward"), on_policy())
    wanted = gradient_of(lambda theta: BETA * sequence_kl(theta, REFERENCE) - mean_reward(theta), THETA) / LENGTH
    assert relative_error(found, wanted) < EXACT


def test_all_groups_are_there():
    assert len(groups(3)) == 13**3
    assert len(groups(3).unique(dim=0)) == 13**3
