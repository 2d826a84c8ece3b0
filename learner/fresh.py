"""What a router starts training from: a look at the experts' states, or at their words; and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from experts.config import RouterConfig
from experts.expert import Encoded, whole
from experts.joining import settle
from experts.loading import FrozenModel
from experts.operations import RouterOperations, states_of
from experts.router import Perceiver
from experts.state import Arrays, stack_features, take_arrays
from experts.warmstart import spoken, warm_start


class Fresh(NamedTuple):
    """A router's weights, and floating-point operations that it took to find them.

    experts, experts_cold: of making the states that were looked at, and what they would be without a cache.
    learner: of training the router.
    before, after: the error of a warm start, see `experts.warmstart`.
    """

    arrays: Arrays
    experts: float = 0.0
    experts_cold: float = 0.0
    learner: float = 0.0
    before: float = 0.0
    after: float = 0.0


def calibrated(router: nn.Module, features: Sequence[Encoded], config: RouterConfig) -> Fresh:
    """Input projections fitted to states; a router of your own without `calibrate` starts as it was made."""
    if calibrate := getattr(router, "calibrate", None):
        calibrate(stack_features([e.features for e in whole(features)]), config.calibration.ridge)
    return _fresh(router, features)


def joined(router: nn.Module, features: Sequence[Encoded], new: Sequence[int], config: RouterConfig) -> Fresh:
    """What a trained router becomes when its new experts' are fitted to it, see `experts.joining`."""
    assert isinstance(router, Perceiver)
    settle(router, stack_features([e.features for e in whole(features)]), new, config.calibration.ridge)
    return _fresh(router, features)


def warmed(
    router: nn.Module,
    experts: int,
    policy: FrozenModel,
    texts: Sequence[str],
    features: Sequence[Encoded],
    config: RouterConfig,
    seed: int,
) -> Fresh:
    """What a router becomes by `experts.warmstart`.

    texts: one a prompt of the features, in their order.
    """
    states, warm = [e.features for e in whole(features)], config.warm_start
    wanted = spoken(texts, policy, config.latents)
    before, after = warm_start(router, stack_features(states), experts, wanted, warm, seed)
    forward = RouterOperations(router.requires_grad_(False), experts, "cpu")(states_of(states), warm.batch)
    return _fresh(router, features, 3.0 * forward * warm.steps, before, after)


def _fresh(
    router: nn.Module, features: Sequence[Encoded], learner: float = 0.0, before: float = 0.0, after: float = 0.0
) -> Fresh:
    spent, cold = sum(e.operations for e in features), sum(e.cold for e in features)
    return Fresh(take_arrays(router), spent, cold, learner, before, after)
