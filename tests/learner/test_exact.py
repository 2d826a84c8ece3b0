"""The expected gradient of the code, all groups enumerated, against the objectives of docs/mathematics.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from learner.config import AlgorithmConfig
from tests.learner.enumeration import (
    BETA,
    LENGTH,
    REWARDS,
    Setting,
    code_gradient,
    gradient_of,
    groups,
    mean_reward,
    parameters,
    relative_error,
    sequence_kl,
    token_kl,
    written,
)

EXACT = 1e-11
ALGORITHMS = ["grpo", "dr_grpo", "rloo"]
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
    """An algorithm's settings; a large KL coefficient, so that the term matters."""
    kl = {"reference": "none"} if estimator == "none" else {"estimator": estimator, "coefficient": BETA}
    return AlgorithmConfig.model_validate(
        {"kind": kind, "aggregation": aggregation, "constant_length": LENGTH, "kl": kl, **settings}
    )


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


@pytest.mark.parametrize(
    ("sampler", "cap"), [(OLD, 2.0), (NEAR, 2.0), (FAR, 1.1), (NEAR, 0.0)], ids=["same", "engine", "truncated", "off"]
)
@every_estimator
@every_algorithm
def test_stale_gradient_is_that_of_the_objective(kind, estimator, sampler, cap):
    """Two versions old; the sampling engine agrees, differs, hits the cap, or goes uncorrected."""
    how = config(kind, estimator, "sequence", correction_cap=cap)
    setting = Setting(THETA, OLD, sampler, REFERENCE)
    found, clipped, corrected = code_gradient(how, setting)
    assert not clipped
    assert corrected == (cap == 1.1)
    assert relative_error(found, written(how, setting)) < EXACT


@every_algorithm
def test_the_clip_stops_what_has_moved_far_enough(kind):
    how = config(kind, "k3_weighted", eps_low=0.02, eps_high=0.03)
    setting = Setting(THETA, OLD, NEAR, REFERENCE)
    found, clipped, _ = code_gradient(how, setting)
    assert clipped
    assert relative_error(found, written(how, setting, clip=True)) < EXACT
    assert relative_error(found, written(how, setting)) > 1e-3


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
