"""Recipes: everything that decides what the models of a zoo world become."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rewards.config import DataConfig

FROZEN = ConfigDict(frozen=True, extra="forbid")

ZOO_FORMAT = 1
"""Raised whenever the zoo's code would make other models of the same recipe."""


END, FILLER = "<end>", "#"
"""Tokens of every zoo model: the end of an answer, and what fills the hint region's other slots."""

RECIPES = resources.files("cluster.zoo").joinpath("recipes")


class ZooError(ValueError):
    """A recipe or a zoo folder that cannot be used; the message is one line and says what to do."""


class TokenizerRecipe(BaseModel):
    """A BPE tokenizer that splits only at numbers and newlines, so that template sentences become few tokens.

    numbers: `whole` keeps integers in one piece, `digits` splits them.
    """

    model_config = FROZEN
    vocabulary: int = Field(500, ge=16)
    numbers: Literal["whole", "digits"] = "whole"


class ModelRecipe(BaseModel):
    """Shape of a decoder; input and output embeddings are tied."""

    model_config = FROZEN
    architecture: Literal["llama", "qwen2", "gpt_neox"]
    width: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(4, ge=1)
    feedforward: int = Field(ge=8)

    @model_validator(mode="after")
    def _heads(self) -> ModelRecipe:
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(f"width {self.width}, heads {self.heads} and kv_heads {self.kv_heads} do not divide")
        if self.architecture == "gpt_neox" and self.kv_heads != self.heads:
            raise ValueError("gpt_neox has no grouped heads: kv_heads must equal heads")
        return self


class Phase(BaseModel):
    """One stretch of training with AdamW: linear warm-up, then cosine down to zero."""

    model_config = FROZEN
    steps: int = Field(ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0.0)
    warmup: int = Field(20, ge=0)


class ExpertRecipe(BaseModel):
    """A model that answers one task, and that task's part of composed prompts.

    mixture: share of the training documents per task of `data.tasks`; each is the task itself or
        one composed of it.
    """

    model_config = FROZEN
    name: str
    task: str
    tokenizer: TokenizerRecipe
    model: ModelRecipe
    training: Phase
    mixture: dict[str, float] = Field(min_length=1)


class HintRecipe(BaseModel):
    """The hint region: embedding slots in front of the prompt, where a run's soft prefix will go.

    layout: `operands` writes the answers of a composed task's parts as `a + b`, each part's answer
        in its own slot also when its task stands alone; `answer` writes the answer itself.
        The remaining slots hold the filler token.
    shown, none, filler, zero: shares of the documents with a hint, with the region's slots masked,
        with filler only, and with zero embeddings.
    right: chance that a shown hint is right, else it is another answer of the task (`answer` only).
    corrupted: chance that a document without a hint has another answer of the task as its target.
    """

    model_config = FROZEN
    slots: int = Field(8, ge=1)
    layout: Literal["operands", "answer"]
    shown: float = Field(0.5, ge=0.0)
    none: float = Field(0.25, ge=0.0)
    filler: float = Field(0.125, ge=0.0)
    zero: float = Field(0.125, ge=0.0)
    right: float = Field(1.0, ge=0.0, le=1.0)
    corrupted: float = Field(0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _shares(self) -> HintRecipe:
        if abs(sum(self.shares) - 1.0) > 1e-6:
            raise ValueError(f"shown, none, filler and zero add up to {sum(self.shares)}, not 1")
        return self

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """shown, none, filler, zero."""
        return self.shown, self.none, self.filler, self.zero


class PolicyRecipe(BaseModel):
    """The policy: weak by itself, able to use a hint.

    warm: short documents [hint][last line of a composed prompt][answer] with random position gaps,
        which teach it to combine the hint's operands; composed worlds need it.
    """

    model_config = FROZEN
    name: str = "policy"
    tokenizer: TokenizerRecipe
    model: ModelRecipe
    hint: HintRecipe
    warm: Phase | None = None
    training: Phase
    mixture: dict[str, float] = Field(min_length=1)


class Recipe(BaseModel):
    """A zoo world: its data, its experts and its policy.

    seed: of initial weights and of the order of documents; the data has its own.
    evaluate: how many test prompts a task are answered for the model cards.
    """

    model_config = FROZEN
    world: str = Field(pattern=r"^[a-z0-9_]+$")
    seed: int = 0
    evaluate: int = Field(400, ge=1)
    data: DataConfig
    experts: tuple[ExpertRecipe, ...]
    policy: PolicyRecipe

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        tasks = {task.name: task for task in self.data.tasks}
        names = [*(expert.name for expert in self.experts), self.policy.name]
        if len(set(names)) != len(names):
            raise ValueError(f"two models share a name: {names}")
        for expert in self.experts:
            for name in expert.mixture:
                if name not in tasks or expert.task not in (name, *(tasks[name].compose or ())):
                    raise ValueError(
                        f"expert {expert.name!r}: mixture names {name!r}, which has no part {expert.task!r}"
                    )
        for name in self.policy.mixture:
            if name not in tasks:
                raise ValueError(f"policy: mixture names {name!r}, which is no task in data.tasks")
        if (self.policy.hint.layout == "operands" or self.policy.warm) and len(self.composed) != 1:
            raise ValueError("policy: operands and a warm phase need exactly one composed task in data.tasks")
        return self

    @property
    def composed(self) -> list[str]:
        """Names of the composed tasks."""
        return [task.name for task in self.data.tasks if task.compose]

    @property
    def models(self) -> tuple[ExpertRecipe | PolicyRecipe, ...]:
        """The policy, then the experts."""
        return (self.policy, *self.experts)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with the recipe and with ZOO_FORMAT."""
        # Of the data only what is said: a setting that tasks learn to have later does not make these others.
        data = self.data.model_dump(mode="json", exclude_defaults=True)
        text = json.dumps([ZOO_FORMAT, self.model_dump(mode="json") | {"data": data}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        """Name of the world's folder under the zoo's root."""
        return f"{self.world}-{self.fingerprint}"


def worlds() -> tuple[str, ...]:
    """Names of the worlds that come with the package."""
    entries = [entry.name for entry in RECIPES.iterdir()]
    return tuple(sorted(name.removesuffix(".yaml") for name in entries if name.endswith(".yaml")))


def seed_of(world: str) -> int | None:
    """The seed in a world's name such as `composed@1`; None in one that leaves it to the recipe.

    Raises:
        ZooError: when there is no such world, or what stands after the @ is no seed.
    """
    name, at, seed = world.partition("@")
    if name not in worlds():
        raise ZooError(f"no zoo world {name!r}: known are {', '.join(worlds())}")
    if at and not re.fullmatch("[0-9]{1,9}", seed):
        raise ZooError(f"zoo world {world!r}: after the @ stands a seed, as in {name}@1")
    return int(seed) if at else None


def load_recipe(world: str | Path) -> Recipe:
    """A recipe by its world's name, with another seed after an @, or from a YAML file.

    Raises:
        ZooError: when there is no such recipe or it is wrong.
    """
    name, seed = str(world).partition("@")[0], None
    if name in worlds():
        seed, text = seed_of(str(world)), RECIPES.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    elif Path(world).is_file():
        text = Path(world).read_text(encoding="utf-8")
    else:
        raise ZooError(f"no zoo world {str(world)!r}: known are {', '.join(worlds())}, or give a recipe's YAML file")
    try:
        document = yaml.safe_load(text)
        return Recipe.model_validate(document if seed is None else document | {"seed": seed})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ZooError(f"zoo recipe {world}: {where}: {first['msg']}") from error
    except yaml.YAMLError as error:
        raise ZooError(f"zoo recipe {world} is no YAML: {' '.join(str(error).split())}") from error
