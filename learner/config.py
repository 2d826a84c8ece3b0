"""The `algorithm` and `learner` sections of the configuration."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FROZEN = ConfigDict(frozen=True, extra="forbid")

# The published settings of a kind, where they are not GRPO's: DAPO arXiv 2503.14476, GSPO 2507.18071 section 5.1,
# CISPO 2506.13585 (no lower bound) with the upper one of 2510.13786, a weight of 5.
KIND_DEFAULTS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "dapo": {"eps_high": 0.28, "aggregation": "token", "dynamic_sampling": True},
        "gspo": {"eps_low": 3e-4, "eps_high": 4e-4},
        "cispo": {"eps_low": 1.0, "eps_high": 4.0, "aggregation": "token"},
    }
)


class KLConfig(BaseModel):
    """The penalty that keeps the policy near a reference (docs/mathematics.md).

    estimator: `k3`; `k3_weighted` multiplies it by the ratio, which makes its gradient that of the
        tokens' KL(policy || reference), stale or not; `k1_reward` takes the summed k1 off the reward
        instead of adding to the loss.
    share: of the groups, drawn by prompt: only their KL is computed, and counts 1 / share times, so that the
        penalty keeps its expectation at a part of its cost.
    """

    model_config = FROZEN
    coefficient: float = Field(0.04, ge=0.0)
    reference: Literal["no_prefix", "initial_router", "none"] = "no_prefix"
    estimator: Literal["k3", "k3_weighted", "k1_reward"] = "k3"
    share: float = Field(1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.share < 1 and self.estimator == "k1_reward":
            raise ValueError("algorithm.kl.share below 1 needs an estimator in the loss: k3 or k3_weighted")
        return self


class AlgorithmConfig(BaseModel):
    """How rewards become a loss (docs/mathematics.md).

    kind: `grpo`, `dr_grpo`, `rloo`, `dapo`, `gspo`, `cispo`, or `module:Class` of your own.  Three have defaults
        of their own: `dapo` eps_high 0.28, aggregation token, dynamic_sampling; `gspo` eps_low 3e-4, eps_high
        4e-4; `cispo` eps_low 1 (no lower bound), eps_high 4, aggregation token.
    eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high].
    aggregation: `sequence` = mean over a completion's tokens, then over completions; `token` = mean
        over all tokens of the update; `constant` = sum over `constant_length`, mean over completions.
    dynamic_sampling: a group whose completions all got the same reward ends as `filtered`, and another prompt
        takes its place in the update.
    correction: of the sampling engine's log-probabilities, by the weight exp(old - sampler): `tis` cuts it at
        `correction_cap`; `icepop` drops tokens whose weight is outside [`icepop_low`, `icepop_high`]; `none`.
    choice_entropy: bonus on the entropy of a router's choices (`router.kind: top1`, `router.gate`).
    choice_after: updates before the choices learn too. A first prefix is worse than none, and a gate that is paid for
        saying so closes for good, with the router behind it untaught. None means a third of the run's steps for a gate,
        and 0 with `router.warm_start` or `router.init`, and for `router.kind: top1`.
    """

    model_config = FROZEN
    kind: str = "grpo"
    eps_low: float = Field(0.2, gt=0.0, le=1.0)
    eps_high: float = Field(0.2, gt=0.0)
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    constant_length: int | None = Field(None, ge=1)
    dynamic_sampling: bool = False
    correction: Literal["tis", "icepop", "none"] = "tis"
    correction_cap: float = Field(2.0, ge=0.0)
    icepop_low: float = Field(0.5, ge=0.0, le=1.0)
    icepop_high: float = Field(5.0, ge=1.0)
    choice_entropy: float = Field(0.01, ge=0.0)
    choice_after: int | None = Field(None, ge=0)
    kl: KLConfig = KLConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("kind"), str):
            return KIND_DEFAULTS.get(data["kind"], {}) | data
        return data

    @model_validator(mode="after")
    def _check(self) -> AlgorithmConfig:
        if self.aggregation == "constant" and self.constant_length is None:
            raise ValueError("algorithm.aggregation: constant needs algorithm.constant_length")
        if self.correction_cap == 0:
            raise ValueError("algorithm.correction_cap: 0 would drop every token; for no correction: correction: none")
        penalised = self.kl.reference != "none" and self.kl.coefficient > 0 and self.kl.estimator == "k1_reward"
        if self.dynamic_sampling and penalised:
            raise ValueError(
                "algorithm.dynamic_sampling drops groups by their rewards, which kl.estimator: k1_reward changes "
                "afterwards; use k3 or k3_weighted, or dynamic_sampling: false"
            )
        # Compared by value: a run's resolved configuration names every key and must load again.
        users = {
            "constant_length": ("aggregation", "constant"),
            "correction_cap": ("correction", "tis"),
            "icepop_low": ("correction", "icepop"),
            "icepop_high": ("correction", "icepop"),
        }
        for name, (key, user) in users.items():
            unchanged = getattr(self, name) == type(self).model_fields[name].default
            if not unchanged and getattr(self, key) != user:
                raise ValueError(
                    f"algorithm.{name} has no effect with {key}: {getattr(self, key)}; "
                    f"set {key}: {user} or leave {name} out"
                )
        return self


class LearnerConfig(BaseModel):
    """The DeepSpeed learner.

    groups: prompts an update trains on (B), over all ranks.
    schedule: how the learning rate goes on after `warmup_steps`: `linear` and `cosine` fall to
        `final_rate` of it at the run's last step, because late steps otherwise mostly follow noise.
    microbatch_tokens: padded tokens (prefix, prompt and completions) the frozen policy sees at once.
    checkpoint_activations: of the policy's layers only the inputs are kept, and the rest is computed a second time:
        much less memory a token for about a third more time (docs/memory.md).
    zero_stage: 0 to 2; 1 and 2 shard the optimizer over ranks, which a few megabytes rarely repay; 3 is refused.
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
    zero_stage: int = Field(0, ge=0)
    microbatch_tokens: int = Field(16_384, ge=1)
    checkpoint_activations: bool = False
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
