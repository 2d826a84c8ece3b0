"""Reasoning Gym: the only module that knows its interface."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from enum import Enum
from typing import Any

import numpy as np
import reasoning_gym
from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum

from rewards.config import TaskConfig
from rewards.gym_scorers import COMPARISONS, FORMS, SCORERS, holds
from rewards.readings import readings
from rewards.verify import READING_ERRORS, RewardsError, Verifier
from rewards.witnesses import witness
from rollout.types import Prompt

Generated = tuple[dict[str, Any], int | None]  # an entry, and the level of the task's curriculum that it is of
_NO_NUMBER = re.compile(r"(?<![a-z])(nan|inf|infinity)[ij]?(?![a-z])", re.IGNORECASE)
_EQUAL = 1e-9  # some data sets add the score of a right answer up from floats
_NEARLY = 0.99
_LONGEST = 20_000  # characters of an answer, or four times the gold answer's


class GymVerifier:
    """The data set's own scoring of a completion's answer (see `readings`), where that is safe and exact.

    A right answer scores 1.0: the gold answer itself, or one that the data set scores 1.  Where its scoring forgives,
    `COMPARISONS` says instead what is right.  The score of a wrong answer is the data set's own shaped one, at most
    .99, and 0 where that would call it right.  Where the data set evaluates answers, `SCORERS` score in its place.
    """

    def __init__(self, task: str, dataset: str, config: dict[str, Any], level: int | None = None) -> None:
        self.task, self.dataset, self.config, self.level = task, dataset, config, level
        self._scorers: dict[int | None, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_scorers": {}}

    def prepare(self) -> None:
        """Builds the data set whose scoring is used."""
        if self.dataset not in SCORERS:
            self._scorer(self.level)

    def score(self, completion: str, prompt: Prompt) -> float:
        """In [0, 1]; the best of what its readings score.

        Raises:
            READING_ERRORS: none of the readings can be read.
        """
        scores, failure = [0.0], None
        for answer in readings(completion, prompt.payload["entry"]["answer"]):
            try:
                scores.append(self._score(answer, prompt))
            except READING_ERRORS as error:
                failure = failure or error
            if scores[-1] == 1.0:
                return 1.0
        if failure is not None and len(scores) == 1:
            raise failure
        return max(scores)

    def known_good(self, prompt: Prompt) -> str | None:
        """The gold answer, or an answer of ours to an entry without one, in tags; None if none is known."""
        entry = prompt.payload["entry"]
        answer = witness(self.dataset, entry) if entry["answer"] is None else str(entry["answer"])
        return None if answer is None else f"So it is <answer>{answer}</answer>"

    def _score(self, answer: str, prompt: Prompt) -> float:
        entry = prompt.payload["entry"]
        gold = None if entry["answer"] is None else str(entry["answer"]).strip()
        # min(1, nan) is 1 to Python, and some scores are made that way: no number is no answer.
        if _NO_NUMBER.search(answer) and not _NO_NUMBER.search(gold or ""):
            return 0.0
        if len(answer) > max(_LONGEST, 4 * len(gold or "")):
            return 0.0
        if self.dataset in FORMS and answer != gold and not holds(FORMS, self.dataset, answer, entry):
            return 0.0
        if self.dataset in SCORERS:
            shaped = SCORERS[self.dataset](answer, entry)
        else:
            shaped = float(self._scorer(prompt.payload.get("level", self.level)).score_answer(answer, entry))
        if answer == gold:
            return 1.0
        compared = self.dataset in COMPARISONS
        if holds(COMPARISONS, self.dataset, answer, entry) if compared else shaped >= 1 - _EQUAL:
            return 1.0
        return min(_NEARLY, shaped) if 0.0 < shaped < 1 - _EQUAL else 0.0

    def _scorer(self, level: int | None) -> Any:
        if level not in self._scorers:
            self._scorers[level] = _create(self.task, self.dataset, seed=0, size=1, config=self.config, level=level)
        return self._scorers[level]


def gym_verifier(task: TaskConfig) -> Verifier:
    """The data set's own scoring, or ours where that cannot be trusted."""
    assert task.dataset is not None
    return GymVerifier(task.name, task.dataset, task.config, task.level)


def generate(task: TaskConfig, seed: int) -> list[Generated]:
    """`task.size` entries of the data set, repeats included, in this process, on whose hash seed some depend.

    Raises:
        RewardsError: unknown data set or setting, or settings that the data set refuses.
    """
    assert task.dataset is not None
    if task.curriculum is not None:
        levels = task.curriculum.levels
        share = {"curriculum": None, "size": max(1, task.size // len(levels))}
        by_level = {level: generate(task.model_copy(update=share | {"level": level}), seed) for level in levels}
        return [(entry, level) for level, entries in by_level.items() for entry, _ in entries]
    dataset = _create(task.name, task.dataset, seed=seed, size=task.size, config=task.config, level=task.level)
    try:
        with _global_draws(f"{seed}/{task.dataset}"):
            return [(dataset[index], None) for index in range(task.size)]
    except Exception as error:  # each of a hundred generators fails in its own way on settings it did not check
        raise RewardsError(
            f"task {task.name!r}: {task.dataset} cannot generate with config {task.config}: "
            f"{type(error).__name__}: {error}; change data.tasks' config"
        ) from error


@contextmanager
def _global_draws(seed: str) -> Iterator[None]:
    """Some generators also draw from Python's and numpy's global generators: seeded for as long as the block lasts."""
    kept, kept_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)


def categories() -> dict[str, list[str]]:
    """Names of the data sets by category; not those that need other data sets to work on."""
    found: dict[str, list[str]] = {}
    for name, (kind, _) in sorted(DATASETS.items()):
        parts = kind.__module__.split(".")
        if len(parts) > 2:
            found.setdefault(parts[1], []).append(name)
    return found


def datasets_of(task: TaskConfig) -> list[str]:
    """The data sets of a task's category, without those that it excludes.

    Raises:
        RewardsError: unknown category or excluded data set, or none is left.
    """
    known = categories()
    category = str(task.category)
    if category not in known:
        nearest = _nearest(category, list(known))
        raise RewardsError(f"task {task.name!r}: Reasoning Gym has no category {category!r}{nearest}")
    members = known[category]
    for name in task.exclude:
        if name not in members:
            raise RewardsError(f"task {task.name!r}: {task.category} has no data set {name!r}{_nearest(name, members)}")
    left = [name for name in members if name not in task.exclude]
    if not left:
        raise RewardsError(f"task {task.name!r}: exclude leaves nothing of {task.category}")
    return left


def _create(task: str, name: str, *, seed: int, size: int, config: dict[str, Any], level: int | None) -> Any:
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
        settings = _of_level(task, name, level) | {k: _enums(task, k, value, known[k]) for k, value in config.items()}
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RewardsError):
            raise
        raise RewardsError(f"task {task!r}: {name} refuses config {config}: {error}") from error


def _of_level(task: str, name: str, level: int | None) -> dict[str, Any]:
    """The settings that the data set's curriculum gives a level."""
    if level is None:
        return {}
    if not has_curriculum(name):
        raise RewardsError(f"task {task!r}: {name} has no curriculum: leave level out")
    curriculum = create_curriculum(name)
    highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if level > highest:
        raise RewardsError(f"task {task!r}: the curriculum of {name} ends at level {highest}, level is {level}")
    curriculum.set_global_level(level)
    made = curriculum.generate_configuration()
    fields = [field.name for field in dataclasses.fields(made) if field.name not in ("seed", "size")]
    return {field: getattr(made, field) for field in fields}


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
