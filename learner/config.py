"""The `algorithm` and `learner` sections of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FROZEN = ConfigDict(frozen=True, extra="forbid")


class KLConfig(BaseModel):
    """The penalty that keeps the policy near a reference (docs/mathematics.md).

    estimator: `k3`; `k3_weighted` multiplies it by the ratio, which makes its gradient that of the
        tokens' KL(policy || reference), stale or not; `k1_reward` takes the summed k1 off the reward
        instead of adding to the loss.
    """

    model_config = FROZEN
    coefficient: float = Field(0.04, ge=0.0)
    reference: Literal["no_prefix", "initial_router", "none"] = "no_prefix"
    estimator: Literal["k3", "k3_weighted", "k1_reward"] = "k3"


class AlgorithmConfig(BaseModel):
    """How rewards become a loss.

    kind: `grpo`, `dr_grpo`, `rloo`, or `module:Class` of your own.
    aggregation: `sequence` = mean over a completion's tokens, then over completions; `token` = mean
        over all tokens of the update; `constant` = sum over `constant_length`, mean over completions.
    correction_cap: C of the truncated importance weight min(exp(old - sampler), C); 0 switches it off.
    """

    model_config = FROZEN
    kind: str = "grpo"
    eps_low: float = Field(0.2, gt=0.0, lt=1.0)
    eps_high: float = Field(0.2, gt=0.0)
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    constant_length: int | None = Field(None, ge=1)
    correction_cap: float = Field(2.0, ge=0.0)
    kl: KLConfig = KLConfig()

    @model_validator(mode="after")
    def _length(self) -> AlgorithmConfig:
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError("algorithm.aggregation: constant needs algorithm.constant_length")
        return self


class LearnerConfig(BaseModel):
    """The DeepSpeed learner.

    groups: prompts an update trains on (B), over all ranks.
    schedule: how the learning rate goes on after `warmup_steps`: `linear` and `cosine` fall to
        `final_rate` of it at the run's last step, because late steps otherwise mostly follow noise.
    microbatch_tokens: padded tokens (prefix, prompt and completions) the frozen policy sees at once.
    zero_stage: 0 to 2; 3 would shard a module of a few megabytes and is refused.
    mismatch_warning: mean absolute log-probability mismatch between engine and learner that warns.
    """

    model_config = FROZEN
    groups: int = Field(32, ge=1)
    learning_rate: float = Field(1e-4, gt=0.0)
    warmup_steps: int = Field(10, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_rate: float = Field(0.1, ge=0.0, le=1.0)
    weight_decay: float = Field(0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(1.0, gt=0.0)
    ranks: int = Field(1, ge=1)
    zero_stage: int = Field(1, ge=0)
    microbatch_tokens: int = Field(16_384, ge=1)
    mismatch_warning: float = Field(0.02, gt=0.0)
    cpus: float = Field(0.0, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    threads: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> LearnerConfig:
        if self.zero_stage > 2:
            raise ValueError("learner.zero_stage: ZeRO 3 is refused: the router is megabytes, use 0, 1 or 2")
        if self.groups < self.ranks:
            raise ValueError(f"learner.ranks {self.ranks} needs at least as many learner.groups, not {self.groups}")
        return self
