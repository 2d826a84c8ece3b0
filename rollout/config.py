"""The `policy` and `sampling` sections of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FROZEN = ConfigDict(frozen=True, extra="forbid")


class PolicyConfig(BaseModel):
    """The frozen policy.

    model: a Hugging Face folder or name, or `zoo/<world>/<model>`.
    workers: rollout workers, each with its own copy of the policy.
    threads: torch threads of a worker; 0 takes the run's `threads`.
    """

    model_config = FROZEN
    model: str
    engine: Literal["transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    workers: int = Field(1, ge=1)
    cpus: float = Field(0.0, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    threads: int = Field(0, ge=0)


class SamplingConfig(BaseModel):
    """How the policy samples in training.

    samples: completions a prompt (the group size G); GRPO compares them, so at least 2.
    top_p, top_k, min_p and penalties are refused on purpose: the learner would need the same
    support (see docs/mathematics.md).
    """

    model_config = FROZEN
    samples: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0.0)
    max_new_tokens: int = Field(128, ge=1)
