"""The `data` and `rewards` sections of the configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FROZEN = ConfigDict(frozen=True, extra="forbid")


class AnswerRange(BaseModel):
    """Keep only entries whose integer answer lies in [min, max], nearly balanced by value.

    `balance` is the exponent of the sampling weight: a value that makes up a share f of the raw
    entries is drawn with weight f ** balance, so 1 keeps the natural frequencies and 0 makes every
    value equally likely.
    """

    model_config = FROZEN
    min: int
    max: int
    balance: float = Field(1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> AnswerRange:
        if self.min > self.max:
            raise ValueError(f"answers.min is {self.min}, above answers.max, {self.max}")
        return self


class TaskConfig(BaseModel):
    """One task of the mixture.

    Exactly one of `dataset` (a Reasoning Gym data set), `compose` (names of other tasks, whose
    integer answers are combined by `operation`), `path` (a local JSONL or Parquet file in
    GSM8K's format, or openai/gsm8k) or `plugin` (`module:Class`) says where its prompts come from.

    weight: share of the training stream, relative to the other tasks; 0 keeps the task as a part
        of composed ones, unseen by itself.
    size: how many entries are generated, or at most read from a file, before splitting.  Held-out
        prompts are distinct; training prompts repeat as often as the source repeats them.
    config: the Reasoning Gym data set's own settings.
    """

    model_config = FROZEN
    name: str
    weight: float = Field(1.0, ge=0.0)
    size: int = Field(12_000, ge=1)
    dataset: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    answers: AnswerRange | None = None
    compose: tuple[str, ...] | None = None
    operation: Literal["sum", "difference", "maximum"] = "sum"
    path: str | None = None
    plugin: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        given = [key for key in ("dataset", "compose", "path", "plugin") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"task {self.name!r} needs exactly one of dataset, compose, path, plugin; got {given or 'none'}"
            )
        if self.compose is not None and len(self.compose) not in (2, 3):
            raise ValueError(f"task {self.name!r}: compose takes 2 or 3 tasks, got {len(self.compose)}")
        if self.config and self.dataset is None:
            raise ValueError(f"task {self.name!r}: config is for Reasoning Gym data sets; {given[0]} takes none")
        return self


class DataConfig(BaseModel):
    """Where prompts come from.

    seed: of every generated entry and of the stream's order; the training seed does not touch it.
    template: how a question becomes the prompt's text; `{question}` stands for it.
    validation, test: shares of the distinct prompts held out, by a hash of the prompt's text, so
        that no training of any kind (policy, experts, router) ever sees them.
    """

    model_config = FROZEN
    seed: int = 1
    template: str = "{question}\nAnswer:"
    validation: float = Field(0.1, gt=0.0, lt=0.5)
    test: float = Field(0.15, gt=0.0, lt=0.5)
    tasks: tuple[TaskConfig, ...]

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("data.tasks is empty: name at least one task")
        if len(set(names)) != len(names):
            raise ValueError(f"data.tasks names a task twice: {sorted(n for n in set(names) if names.count(n) > 1)}")
        if not any(task.weight > 0 for task in self.tasks):
            raise ValueError("every task in data.tasks has weight 0: nothing to train on")
        for task in self.tasks:
            for part in task.compose or ():
                if part not in names or part == task.name:
                    raise ValueError(f"task {task.name!r} composes {part!r}, which is no other task in data.tasks")
        if "{question}" not in self.template:
            raise ValueError("data.template must contain {question}")
        return self


class RewardsConfig(BaseModel):
    """How answers are scored.

    binary_at: when set, a score of at least this counts as 1 and anything less as 0.
    timeout_s: limit for scoring ONE completion; past it the verifier's process is killed and the
        completion is masked, never scored zero.
    masked_limit: a run stops, naming the verifier, when a task's share of masked completions is above
        this over its last groups (50 at least, 200 at most).
    """

    model_config = FROZEN
    workers: int = Field(1, ge=1)
    binary_at: float | None = 0.99
    timeout_s: float = Field(10.0, gt=0.0)
    masked_limit: float = Field(0.2, gt=0.0, le=1.0)
