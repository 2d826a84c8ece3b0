"""The tasks of a run: where their prompts come from, and which of them are held out."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from rewards.composed import composed_entries, composed_verifier
from rewards.config import DataConfig, TaskConfig
from rewards.files import file_entries, hub_entries
from rewards.generation import gym_entries, one_generator
from rewards.numbers import NumberVerifier
from rewards.splits import SPLITS, Balance, Split, check_disjoint, check_questions, split_in, within
from rewards.verifiers import with_settings
from rewards.verify import RewardsError, Verifier
from rollout.types import Prompt

Entries = dict[str, list[Prompt]]


@dataclass(frozen=True)
class Task:
    """One task with its three pools; in each pool a prompt's `ordinal` is its index.

    train: in random order, with the repeats that the source or the balance by answer gives.
    validation, test: distinct prompts, none of them in another pool; any first n of them are
        balanced by answer as `config.answers` says.
    verifier: scores a completion of any of these prompts; can be pickled.
    """

    name: str
    config: TaskConfig
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    verifier: Verifier

    @property
    def pools(self) -> dict[Split, tuple[Prompt, ...]]:
        """The three pools by their names."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts each pool holds, and how many distinct ones the train pool does."""
        distinct = len({prompt.text for prompt in self.train})
        sizes = {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}
        return sizes | {"train_distinct": distinct}


def build_tasks(data: DataConfig) -> dict[str, Task]:
    """Every task of the configuration, in its order, those of weight 0 included.

    Raises:
        RewardsError: naming the task and the setting to change; among others when a task has no
            training prompts.
    """
    sources: dict[str, tuple[list[Prompt], Verifier]] = {}
    tasks = [single for task in data.tasks for single in _expanded(task)]
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        twice = next(task.name for task in tasks if by_name[task.name] is not task)
        raise RewardsError(f"task {twice!r} is named twice, once as a part of a category: rename one")
    for task in tasks:
        for part in task.compose or ():
            if part not in by_name:
                raise RewardsError(f"task {task.name!r} composes {part!r}, a category: name one of its data sets")
    with one_generator():
        # What takes long comes last, so that nobody waits for it to see a wrong path.
        for task in sorted(tasks, key=lambda task: task.dataset is not None):
            if task.compose is None:
                sources[task.name] = _source(task, data)
    for task in tasks:
        if task.compose is not None:
            for part in task.compose:
                if by_name[part].compose is not None:
                    raise RewardsError(f"task {task.name!r}: its part {part!r} is composed itself; compose plain tasks")
            parts = [(by_name[part], sources[part][0]) for part in task.compose]
            sources[task.name] = composed_entries(task, data, parts), composed_verifier(task)
    built = {task.name: _task(task, data, *sources[task.name]) for task in tasks}
    if data.split_by == "question":
        check_questions({name: task.pools for name, task in built.items()})
    return built


def all_entries(task: TaskConfig, data: DataConfig) -> tuple[list[Prompt], Verifier]:
    """Every entry of a task in its source's order, before any is held out, and the task's verifier.

    Raises:
        RewardsError: see `build_tasks`; also for a category, which is many tasks.
    """
    if task.category is not None:
        raise RewardsError(f"task {task.name!r} is a category: name one of its data sets")
    if task.compose is None:
        entries, verifier = _source(task, data)
    else:
        by_name = {other.name: other for other in data.tasks}
        with one_generator():
            parts = [(by_name[part], _source(by_name[part], data)[0]) for part in task.compose]
        entries, verifier = composed_entries(task, data, parts), composed_verifier(task)
    return entries, with_settings(task, verifier)


def of_length(
    tasks: Mapping[str, Task], data: DataConfig, count: Callable[[Prompt], int]
) -> tuple[dict[str, Task], dict[str, int]]:
    """The tasks without prompts of more than `data.max_prompt_tokens`, and how many each of them lost.

    count: tokens of a prompt, as the policy reads it.

    Raises:
        RewardsError: with `long_prompts: refuse`, when there is one; when all of a task's prompts are too long, or all
            of a level of its curriculum.
    """
    limit = data.max_prompt_tokens
    if limit is None:
        return dict(tasks), {}
    kept: dict[str, Task] = {}
    lost: dict[str, int] = {}
    for name, task in tasks.items():
        lengths = {p.text: count(p) for p in {p.text: p for split in SPLITS for p in getattr(task, split)}.values()}
        long = {text: length for text, length in lengths.items() if length > limit}
        if long and data.long_prompts == "refuse":
            text, length = max(long.items(), key=lambda item: item[1])
            raise RewardsError(
                f"task {name!r}: {len(long)} prompts are longer than data.max_prompt_tokens ({limit}), "
                f"one has {length}: raise it, or set data.long_prompts to drop ({text[:60]!r})"
            )
        train, validation, test = ([p for p in getattr(task, split) if p.text not in long] for split in SPLITS)
        if not train:
            raise RewardsError(f"task {name!r}: all prompts are longer than data.max_prompt_tokens ({limit}): raise it")
        _check_levels(task.config, train, f" of at most data.max_prompt_tokens ({limit}); raise it")
        kept[name] = replace(task, train=_numbered(train), validation=_numbered(validation), test=_numbered(test))
        if long:
            lost[name] = len(long)
    return kept, lost


def _expanded(task: TaskConfig) -> list[TaskConfig]:
    """The task itself, or one for each data set of its category."""
    if task.category is None:
        return [task]
    from rewards.gym import datasets_of

    names = datasets_of(task)
    changes = {"category": None, "exclude": (), "weight": task.weight / len(names)}
    return [task.model_copy(update=changes | {"name": f"{task.name}.{name}", "dataset": name}) for name in names]


def _source(task: TaskConfig, data: DataConfig) -> tuple[list[Prompt], Verifier]:
    if task.dataset is not None:
        entries = gym_entries(task, data)
        from rewards.gym import gym_verifier  # two seconds to import; files and plug-ins do without

        return entries, gym_verifier(task)
    if task.path is not None:
        return file_entries(task, data), NumberVerifier()
    if task.hub is not None:
        return hub_entries(task, data), NumberVerifier()
    return _plugin(task, data)


def _plugin(task: TaskConfig, data: DataConfig) -> tuple[list[Prompt], Verifier]:
    """Build `module:Class` with (task, data); it offers `entries() -> list[Prompt]` and `score(completion, prompt)`."""
    made: Any = _load(task)(task, data)
    for method in ("entries", "score"):
        if not callable(getattr(made, method, None)):
            raise RewardsError(f"task {task.name!r}: plugin {task.plugin!r} has no method {method}")
    try:
        pickle.dumps(made)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RewardsError(f"task {task.name!r}: plugin {task.plugin!r} cannot be pickled: {error}") from error
    entries = list(made.entries())
    for entry in entries:
        if not isinstance(entry, Prompt):
            raise RewardsError(
                f"task {task.name!r}: plugin {task.plugin!r} made a {type(entry).__name__}, not a Prompt"
            )
    return [replace(entry, task=task.name, payload={"question": entry.text} | entry.payload) for entry in entries], made


def _load(task: TaskConfig) -> Callable[[TaskConfig, DataConfig], Any]:
    module, _, name = (task.plugin or "").partition(":")
    if not module or not name:
        raise RewardsError(f"task {task.name!r}: plugin {task.plugin!r} must read module:Class")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise RewardsError(
            f"task {task.name!r}: plugin {task.plugin!r}: no module {error.name!r}; is it on the PYTHONPATH?"
        ) from error
    if not callable(found):
        raise RewardsError(f"task {task.name!r}: plugin {task.plugin!r}: module {module!r} has no class {name!r}")
    return found


def _task(task: TaskConfig, data: DataConfig, entries: Sequence[Prompt], verifier: Verifier) -> Task:
    kept = within(entries, task.answers)
    pools: dict[Split, list[Prompt]] = {split: [] for split in SPLITS}
    for entry in kept:
        pools[split_in(entry, data)].append(entry)
    if not pools["train"]:
        raise RewardsError(
            f"task {task.name!r}: no training prompts are left of {len(entries)} entries ({len(kept)} in the range of "
            "answers); enlarge size, widen answers or lower data.validation and data.test"
        )
    balance = Balance(kept, task.answers.balance) if task.answers else None
    final = {split: _pool(task, data, split, pools[split], balance) for split in SPLITS}
    check_disjoint(task.name, final)
    _check_levels(task, final["train"], "; enlarge size, widen answers")
    return Task(name=task.name, config=task, verifier=with_settings(task, verifier), **final)


def _check_levels(task: TaskConfig, train: Sequence[Prompt], remedy: str) -> None:
    for level in task.curriculum.levels if task.curriculum else ():
        if not any(prompt.payload["level"] == level for prompt in train):
            raise RewardsError(
                f"task {task.name!r}: level {level} of its curriculum has no training prompts{remedy} or leave the "
                "level out"
            )


def _pool(
    task: TaskConfig, data: DataConfig, split: Split, entries: Sequence[Prompt], balance: Balance | None
) -> tuple[Prompt, ...]:
    rng = Random(f"{data.seed}/{task.name}/{split}")
    chosen = list(entries) if split == "train" else _distinct(entries)
    if balance is None:
        rng.shuffle(chosen)
    elif split == "train":
        chosen = balance.resample(chosen, len(chosen), rng)
    else:
        chosen = balance.order(chosen, rng)
    return _numbered(chosen)


def _numbered(entries: Sequence[Prompt]) -> tuple[Prompt, ...]:
    return tuple(replace(entry, ordinal=index) for index, entry in enumerate(entries))


def _distinct(entries: Sequence[Prompt]) -> list[Prompt]:
    return list({entry.text: entry for entry in entries}.values())
