"""A whole algorithm as one small class: rewards to advantages, log-probabilities to a loss per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from experts.plugins import load_plugin
from learner import advantages
from learner.config import AlgorithmConfig
from learner.losses import (
    Denominators,
    Mask,
    PerToken,
    clamped_log_ratio,
    clipped_surrogate,
    engine_weight,
    k1,
    k3,
    masked_outside,
    sequence_ratio,
    token_weights,
    truncated,
    weighted_logprob,
)


@dataclass(frozen=True)
class TokenBatch:
    """What a loss sees of some whole groups; only `logprobs` carries gradient.

    logprobs, old, sampler: of the router being trained, of the one that sampled (recomputed by the
        learner), and as the engine reported them.  reference: None where no KL is measured, and equal
        to `logprobs` for groups whose KL is not.
    rewards, ok: (groups, samples); rows are group-major.
    """

    logprobs: PerToken
    old: PerToken
    sampler: PerToken
    reference: PerToken | None
    rewards: advantages.Rewards
    ok: advantages.Ok
    valid: Mask


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of the update's loss, and per-token tensors for its metrics.

    clipped: where the clip acts.  corrected: where the engine correction is truncated or masks.
    """

    loss: Float[Tensor, ""]
    ratio: PerToken
    clipped: Mask
    corrected: Mask
    kl: PerToken
    kl_clamped: Mask
    advantages: Float[Tensor, "groups samples"]


class GRPO:
    """Group-relative policy optimisation with a clipped ratio, an engine correction and a KL term."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config

    def advantages(self, rewards: advantages.Rewards, ok: advantages.Ok) -> Float[Tensor, "groups samples"]:
        """Normalised by the group's standard deviation."""
        return advantages.normalised(rewards, ok)

    def policy_loss(
        self, batch: TokenBatch, ratio: PerToken, advantage: Float[Tensor, " rows"]
    ) -> tuple[PerToken, Mask]:
        """Loss per token before correction and KL, and where the clip acts."""
        return clipped_surrogate(ratio, advantage, self.config.eps_low, self.config.eps_high)

    def correction(self, batch: TokenBatch) -> tuple[PerToken, Mask]:
        """Weight per token for what the sampling engine computed otherwise, without gradient, and where it is cut."""
        c = self.config
        if c.correction == "none":
            return torch.ones_like(batch.old), torch.zeros_like(batch.valid)
        weight = engine_weight(batch.old, batch.sampler)
        if c.correction == "icepop":
            return masked_outside(weight, c.icepop_low, c.icepop_high)
        return truncated(weight, c.correction_cap)

    def loss(self, batch: TokenBatch, denominators: Denominators) -> LossTerms:
        """This micro-batch's share of the loss: shares of all micro-batches and ranks add up to it."""
        c = self.config
        log_ratio, _ = clamped_log_ratio(batch.logprobs, batch.old)
        ratio = log_ratio.exp()
        kl, kl_clamped = torch.zeros_like(batch.old), torch.zeros_like(batch.valid)
        if batch.reference is not None:
            kl, kl_clamped = k3(batch.logprobs, batch.reference)
        rewards = batch.rewards
        if batch.reference is not None and c.kl.estimator == "k1_reward":
            penalty, kl_clamped = k1(batch.old, batch.reference)
            penalty = torch.where(batch.valid, penalty, 0.0).sum(dim=1).view_as(rewards)
            rewards = rewards - c.kl.coefficient * penalty.to(rewards.dtype)
        advantage = self.advantages(rewards, batch.ok)
        policy, clipped = self.policy_loss(batch, ratio, advantage.reshape(-1).to(ratio.dtype))
        correction, corrected = self.correction(batch)
        per_token = policy * correction
        if batch.reference is not None and c.kl.estimator != "k1_reward":
            weight = ratio * correction if c.kl.estimator == "k3_weighted" else 1.0
            per_token = per_token + c.kl.coefficient / c.kl.share * kl * weight
        weights = token_weights(batch.valid, c.aggregation, denominators)
        return LossTerms(
            loss=(torch.where(batch.valid, per_token, 0.0) * weights).sum(),
            ratio=ratio.detach(),
            clipped=clipped & batch.valid,
            corrected=corrected & batch.valid,
            kl=kl.detach(),
            kl_clamped=kl_clamped & batch.valid,
            advantages=advantage,
        )


class DrGRPO(GRPO):
    """GRPO without the division by the group's standard deviation; use with `aggregation: constant`."""

    def advantages(self, rewards: advantages.Rewards, ok: advantages.Ok) -> Float[Tensor, "groups samples"]:
        """Centered only."""
        return advantages.centered(rewards, ok)


class RLOO(GRPO):
    """The leave-one-out mean as the baseline."""

    def advantages(self, rewards: advantages.Rewards, ok: advantages.Ok) -> Float[Tensor, "groups samples"]:
        """Reward minus the mean of the others."""
        return advantages.leave_one_out(rewards, ok)


class DAPO(GRPO):
    """GRPO with a higher upper clip, all tokens alike, and groups without signal dropped (arXiv 2503.14476).

    All three are settings (`config.KIND_DEFAULTS`): the class only names them.
    """


class GSPO(GRPO):
    """One ratio and one clip for a whole completion (arXiv 2507.18071)."""

    def policy_loss(
        self, batch: TokenBatch, ratio: PerToken, advantage: Float[Tensor, " rows"]
    ) -> tuple[PerToken, Mask]:
        """The clipped surrogate of the completion's ratio; the clip stops all of its tokens or none."""
        whole = sequence_ratio(clamped_log_ratio(batch.logprobs, batch.old)[0], batch.valid)
        return super().policy_loss(batch, whole, advantage)


class CISPO(GRPO):
    """REINFORCE with a clipped importance weight: no token is dropped (arXiv 2506.13585)."""

    def policy_loss(
        self, batch: TokenBatch, ratio: PerToken, advantage: Float[Tensor, " rows"]
    ) -> tuple[PerToken, Mask]:
        """Log-probabilities weighted by the clipped ratio."""
        return weighted_logprob(batch.logprobs, ratio, advantage, self.config.eps_low, self.config.eps_high)


ALGORITHMS = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "rloo": RLOO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
}


def build_algorithm(config: AlgorithmConfig) -> GRPO:
    """The configured algorithm; `module:Class` may subclass GRPO or offer the same `loss`."""
    return (ALGORITHMS.get(config.kind) or load_plugin(config.kind, "algorithm.kind", ALGORITHMS))(config)
