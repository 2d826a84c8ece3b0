"""The `algorithm` section: each kind's published defaults, and settings that would have no effect."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from learner.algorithms import ALGORITHMS
from learner.config import KIND_DEFAULTS, AlgorithmConfig


def read(**settings: object) -> AlgorithmConfig:
    """As from a recipe."""
    return AlgorithmConfig.model_validate(settings)


def test_dapo_brings_its_settings_and_the_user_may_change_them():
    plain, dapo = read(), read(kind="dapo")
    assert (plain.eps_high, plain.aggregation, plain.dynamic_sampling) == (0.2, "sequence", False)
    assert (dapo.eps_high, dapo.aggregation, dapo.dynamic_sampling) == (0.28, "token", True)
    changed = read(kind="dapo", eps_high=0.25, dynamic_sampling=False)
    assert (changed.eps_high, changed.aggregation, changed.dynamic_sampling) == (0.25, "token", False)


def test_defaults_name_algorithms_that_exist():
    assert set(KIND_DEFAULTS) < set(ALGORITHMS)


@pytest.mark.parametrize("kind", [*ALGORITHMS, "mine.module:Mine"])
@pytest.mark.parametrize("settings", [{}, {"correction": "icepop", "icepop_low": 0.3}, {"correction": "none"}])
def test_a_resolved_configuration_loads_again(kind, settings):
    """It names every key, also those that have no effect."""
    config = read(kind=kind, **settings)
    assert AlgorithmConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl": {"share": 0.5, "estimator": "k1_reward"}}, "kl.share below 1 needs an estimator in the loss"),
        ({"correction": "icepop", "correction_cap": 3.0}, "correction_cap has no effect with correction: icepop"),
        ({"correction": "none", "correction_cap": 3.0}, "set correction: tis or leave correction_cap out"),
        ({"icepop_low": 0.4}, "icepop_low has no effect with correction: tis; set correction: icepop"),
        ({"correction": "none", "icepop_high": 4.0}, "icepop_high has no effect with correction: none"),
        ({"constant_length": 9}, "constant_length has no effect with aggregation: sequence"),
        ({"kind": "dapo", "constant_length": 9}, "constant_length has no effect with aggregation: token"),
        ({"aggregation": "constant"}, "needs algorithm.constant_length"),
        ({"correction_cap": 0}, "for no correction: correction: none"),
        ({"kind": "dapo", "kl": {"estimator": "k1_reward"}}, "or dynamic_sampling: false"),
    ],
)
def test_settings_without_effect_are_refused_with_the_remedy(settings, message):
    with pytest.raises(ValidationError) as raised:
        read(**settings)
    text = raised.value.errors()[0]["msg"]
    assert message in text
    assert "\n" not in text
