"""Reasoning Gym: the only module that knows its interface."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from enum import Enum
from functools import cached_property
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from rewards.config import DataConfig, TaskConfig
from rewards.prompts import prompt_of
from rewards.verify import RewardsError
from rollout.types import Prompt


class GymVerifier:
    """The data set's own scoring of a completion, or of what it puts between <answer> and </answer>."""

    def __init__(self, task: str, dataset: str, config: dict[str, Any]) -> None:
        self.task, self.dataset, self.config = task, dataset, config

    @cached_property
    def _scorer(self) -> Any:
        return _create(self.task, self.dataset, seed=0, size=1, config=self.config)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_scorer"}

    def score(self, completion: str, prompt: Prompt) -> float:
        """Reasoning Gym's score, in [0, 1]."""
        tagged = extract_answer(completion)
        return float(
            self._scorer.score_answer((completion if tagged is None else tagged).strip(), prompt.payload["entry"])
        )


def gym_entries(task: TaskConfig, data: DataConfig) -> list[Prompt]:
    """`task.size` entries of the data set, generated from `data.seed`, repeats included.

    Raises:
        RewardsError: unknown data set or setting, or settings that the data set refuses.
    """
    assert task.dataset is not None
    dataset = _create(task.name, task.dataset, seed=data.seed, size=task.size, config=task.config)
    try:
        entries = [dataset[index] for index in range(task.size)]
    except Exception as error:  # each of a hundred generators fails in its own way on settings it did not check
        raise RewardsError(
            f"task {task.name!r}: {task.dataset} cannot generate with config {task.config}: "
            f"{type(error).__name__}: {error}; change data.tasks' config"
        ) from error
    return [
        prompt_of(task, data, question=entry["question"], answer=str(entry["answer"]), payload={"entry": entry})
        for entry in entries
    ]


def _create(task: str, name: str, *, seed: int, size: int, config: dict[str, Any]) -> Any:
    if name not in DATASETS:
        raise RewardsError(f"task {task!r}: Reasoning Gym has no data set {name!r}{_nearest(name, list(DATASETS))}")
    known = {field.name: field for field in dataclasses.fields(DATASETS[name][1])}
    for key in config:
        if key in ("seed", "size"):
            raise RewardsError(f"task {task!r}: set data.seed and the task's size instead of config.{key}")
        if key not in known:
            raise RewardsError(f"task {task!r}: {name} has no setting {key!r}{_nearest(key, list(known))}")
    if name == "aiw" and len(config.get("task_types", "abc")) != len(config.get("task_type_weights", "abc")):
        raise RewardsError(f"task {task!r}: aiw needs task_type_weights, one for each of task_types")
    try:
        settings = {key: _enums(task, key, value, known[key]) for key, value in config.items()}
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RewardsError):
            raise
        raise RewardsError(f"task {task!r}: {name} refuses config {config}: {error}") from error


def _enums(task: str, key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """Turn a list of names into the enum members that the setting's default consists of, if it does."""
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    if not (
        isinstance(default, list) and default and isinstance(default[0], Enum) and isinstance(value, (list, tuple))
    ):
        return value
    kind = type(default[0])
    members = {str(member.value).lower(): member for member in kind}
    for item in value:
        if str(item).lower() not in members:
            raise RewardsError(f"task {task!r}: {key} has no {item!r}{_nearest(str(item).lower(), list(members))}")
    return [members[str(item).lower()] for item in value]


def _nearest(word: str, known: list[str]) -> str:
    close = get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known are {', '.join(sorted(known)[:12])}, ..."
