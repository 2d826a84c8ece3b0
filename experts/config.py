"""The `experts`, `cache` and `router` sections of the configuration."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FROZEN = ConfigDict(frozen=True, extra="forbid")
DType = Literal["float32", "bfloat16", "float16"]


class ExpertConfig(BaseModel):
    """One frozen expert.

    model: a Hugging Face folder or name, or `zoo/<world>/<model>`.
    layer: which hidden state is its feature; -1 is the last (after the final norm), 0 the
        embeddings.
    pool: which token's state stands for the prompt.
    max_tokens: an expert sees at most the last so many of its own tokens.
    threads: torch threads of its worker; 0 takes the run's `threads`.
    """

    model_config = FROZEN
    name: str
    model: str
    layer: int = -1
    pool: Literal["last", "first", "mean"] = "last"
    norm: Literal["layer", "none"] = "layer"
    dtype: DType = "float32"
    max_tokens: int = Field(512, ge=1)
    batch: int = Field(64, ge=1)
    cpus: float = Field(0.0, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    threads: int = Field(0, ge=0)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(
                f"expert name {name!r} must be letters, digits, '_', '.' or '-': metrics are named after it"
            )
        return name


class CacheConfig(BaseModel):
    """The feature cache of each expert: memory up to a limit, then optionally a folder on disk."""

    model_config = FROZEN
    memory_mb: float = Field(256.0, ge=0.0)
    disk: str | None = None
    disk_mb: float = Field(4096.0, gt=0.0)


class PrefixConfig(BaseModel):
    """How the soft prefix starts and where it stands in the policy's prompt.

    init: `near_zero` draws the output projection with a std of `scale` times the policy's embedding
        rms, which at width 512 makes a prefix of about 2 % of an embedding's size; `anchored` adds
        such a change to the embeddings of `anchor_tokens`.
    """

    model_config = FROZEN
    init: Literal["near_zero", "anchored"] = "near_zero"
    scale: float = Field(1e-3, gt=0.0)
    anchor_tokens: tuple[int, ...] = ()
    position: Literal["front", "after_bos"] = "front"

    @model_validator(mode="after")
    def _anchors(self) -> PrefixConfig:
        if self.init == "anchored" and not self.anchor_tokens:
            raise ValueError(
                "router.prefix.init: anchored needs router.prefix.anchor_tokens (ids of harmless policy tokens)"
            )
        return self


class CalibrationConfig(BaseModel):
    """Starts the router's input projections from the states of the first training prompts.

    prompts: how many; 0 leaves the projections blind.
    ridge: directions with less than this share of an expert's largest variance count as noise.
    """

    model_config = FROZEN
    prompts: int = Field(512, ge=0)
    ridge: float = Field(0.01, gt=0.0)

    @model_validator(mode="after")
    def _enough(self) -> CalibrationConfig:
        if self.prompts == 1:
            raise ValueError("router.calibration.prompts: 1 prompt has no variance, use 0 for none or at least 2")
        return self


class RouterConfig(BaseModel):
    """The trainable collaborator.

    kind: `perceiver`, or `module:Class` of your own with the same constructor and forward.
    init: a folder with a saved router to start from.
    feedforward: hidden width of the feed-forward block, as a multiple of `width`.
    expert_dropout: chance that an expert is hidden from the router for a group, in training only;
        at least one expert always stays.
    """

    model_config = FROZEN
    kind: str = "perceiver"
    init: str | None = None
    width: int = Field(512, ge=1)
    latents: int = Field(8, ge=1)
    heads: int = Field(8, ge=1)
    feedforward: float = Field(2.0, gt=0.0)
    expert_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    calibration: CalibrationConfig = CalibrationConfig()
    prefix: PrefixConfig = PrefixConfig()

    @model_validator(mode="after")
    def _heads(self) -> RouterConfig:
        if self.width % self.heads:
            raise ValueError(f"router.width {self.width} is not a multiple of router.heads {self.heads}")
        return self
