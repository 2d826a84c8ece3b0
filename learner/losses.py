"""Losses as pure functions of per-token tensors.  The exact definitions: docs/mathematics.md.

Rows are completions, columns their tokens; `valid` marks the real tokens of completions whose
reward is `ok`.  Nothing here knows about models, ranks or micro-batches: denominators come from
outside, because they are global over the whole update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerToken = Float[Tensor, "rows tokens"]
Mask = Bool[Tensor, "rows tokens"]
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Denominators:
    """Of the whole update, over all ranks: valid completions, their tokens, the constant length, and groups.

    group_advantages: of the groups as wholes, by ordinal, for the choices that a router takes.
    """

    completions: int
    tokens: int
    constant_length: int = 0
    groups: int = 1
    group_advantages: Mapping[int, float] = field(default_factory=dict)


def token_weights(valid: Mask, how: Literal["sequence", "token", "constant"], denominators: Denominators) -> PerToken:
    """Weight of each token, such that a loss is the weighted sum over all micro-batches and ranks."""
    mask = valid.to(torch.float64)
    if how == "token":
        return mask / max(denominators.tokens, 1)
    lengths = mask.sum(dim=1, keepdim=True).clamp_min(1) if how == "sequence" else denominators.constant_length
    return mask / lengths / max(denominators.completions, 1)


def clamped_log_ratio(numerator: PerToken, denominator: PerToken) -> tuple[PerToken, Bool[Tensor, "rows tokens"]]:
    """log(numerator / denominator) within +-20, and where the clamp acted."""
    raw = numerator - denominator
    return raw.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), raw.detach().abs() > LOG_RATIO_LIMIT


def clipped_surrogate(
    ratio: PerToken, advantages: Float[Tensor, " rows"], eps_low: float, eps_high: float
) -> tuple[PerToken, Bool[Tensor, "rows tokens"]]:
    """-min(ratio * A, clip(ratio) * A) per token, and where the clip stops the gradient."""
    advantage = advantages[:, None]
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    acts = ((ratio < 1 - eps_low) & (advantage < 0)) | ((ratio > 1 + eps_high) & (advantage > 0))
    return -torch.minimum(ratio * advantage, clipped * advantage), acts


def sequence_ratio(log_ratio: PerToken, valid: Mask) -> PerToken:
    """GSPO's ratio of a completion, the geometric mean of its tokens' ratios, on every token.

    Each token's copy has the gradient of its own log-probability only, as in GSPO-token (arXiv 2507.18071): with
    equal weights within a completion the copies add up to the gradient of the ratio itself, and a correction per
    token finds its token.
    """
    mean = torch.where(valid, log_ratio, 0.0).sum(dim=1, keepdim=True) / valid.sum(dim=1, keepdim=True).clamp_min(1)
    # The bracket is exactly 0, so that a completion's copies are equal to the last bit.
    return (mean.detach() + (log_ratio - log_ratio.detach())).exp()


def weighted_logprob(
    logprobs: PerToken, ratio: PerToken, advantages: Float[Tensor, " rows"], eps_low: float, eps_high: float
) -> tuple[PerToken, Mask]:
    """-clip(ratio) * A * log pi with the clipped ratio detached (CISPO), and where the clip changes a weight.

    The value means nothing; every token keeps a gradient.
    """
    advantage, weight = advantages[:, None], ratio.detach()
    clipped = weight.clamp(1 - eps_low, 1 + eps_high)
    return -clipped * advantage * logprobs, (clipped != weight) & (advantage != 0)


def engine_weight(old: PerToken, sampler: PerToken) -> PerToken:
    """exp(log pi_old - log pi_sampler), detached: what the sampling engine's disagreement asks for."""
    return clamped_log_ratio(old, sampler)[0].exp().detach()


def truncated(weight: PerToken, cap: float) -> tuple[PerToken, Mask]:
    """TIS: min(weight, cap), and where the cap acts."""
    return weight.clamp_max(cap), weight > cap


def masked_outside(weight: PerToken, low: float, high: float) -> tuple[PerToken, Mask]:
    """IcePop (arXiv 2510.18855): the weight within [low, high], 0 outside, and where it is 0."""
    outside = (weight < low) | (weight > high)
    return weight.masked_fill(outside, 0.0), outside


def k1(logprobs: PerToken, reference: PerToken) -> tuple[PerToken, Mask]:
    """The plain log-ratio log(policy / reference), whose mean is KL(policy || reference)."""
    return clamped_log_ratio(logprobs, reference)


def k3(logprobs: PerToken, reference: PerToken) -> tuple[PerToken, Bool[Tensor, "rows tokens"]]:
    """Schulman's k3 estimate of KL(policy || reference): r - 1 - log r with r = reference / policy."""
    log_ratio, clamped = clamped_log_ratio(reference, logprobs)
    return log_ratio.exp() - 1 - log_ratio, clamped
