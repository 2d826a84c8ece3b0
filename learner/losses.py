"""Losses as pure functions of per-token tensors.  The exact definitions: docs/mathematics.md.

Rows are completions, columns their tokens; `valid` marks the real tokens of completions whose
reward is `ok`.  Nothing here knows about models, ranks or micro-batches: denominators come from
outside, because they are global over the whole update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerToken = Float[Tensor, "rows tokens"]
Mask = Bool[Tensor, "rows tokens"]
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Denominators:
    """Of the whole update, over all ranks: valid completions, their tokens, and the constant length."""

    completions: int
    tokens: int
    constant_length: int = 0


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


def engine_correction(old: PerToken, sampler: PerToken, cap: float) -> tuple[PerToken, Mask]:
    """min(exp(log pi_old - log pi_sampler), cap), detached, and where the cap acts; 1 everywhere where `cap` is 0."""
    if cap == 0:
        return torch.ones_like(old), torch.zeros_like(old, dtype=torch.bool)
    weight = clamped_log_ratio(old, sampler)[0].exp().detach()
    return weight.clamp_max(cap), weight > cap


def k1(logprobs: PerToken, reference: PerToken) -> tuple[PerToken, Mask]:
    """The plain log-ratio log(policy / reference), whose mean is KL(policy || reference)."""
    return clamped_log_ratio(logprobs, reference)


def k3(logprobs: PerToken, reference: PerToken) -> tuple[PerToken, Bool[Tensor, "rows tokens"]]:
    """Schulman's k3 estimate of KL(policy || reference): r - 1 - log r with r = reference / policy."""
    log_ratio, clamped = clamped_log_ratio(reference, logprobs)
    return log_ratio.exp() - 1 - log_ratio, clamped
