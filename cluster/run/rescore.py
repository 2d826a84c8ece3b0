"""A run's saved completions under other verifier settings: which verdicts and advantages would change."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from cluster.config import ConfigError, RunConfig, changed, load
from cluster.keys import flat
from cluster.run import checkpoint, groups
from cluster.run.folder import RunFolder
from cluster.run.models import ensure_models
from cluster.run.preflight import check_prompts
from cluster.watch import logs
from learner.algorithms import build_algorithm
from rewards.attack import shown
from rewards.config import DataConfig
from rewards.sources import Task, build_tasks
from rewards.stream import PromptStream
from rewards.verify import is_right
from rewards.worker import RewardWorker
from rollout.types import Completion, Group, Prompt, RewardStatus, Score

TOLERANCE = 1e-6  # up to which rewards and advantages are equal
EXAMPLES = 3  # a task and kind of change
MOVES = ("wrong -> right", "right -> wrong", "masked -> right", "masked -> wrong", "right -> masked", "wrong -> masked")
Advantages = Callable[[Sequence[Score]], list[float] | None]


@dataclass(frozen=True, slots=True)
class Example:
    """One completion whose verdict changes; `move` is one of `MOVES`."""

    move: str
    step: int
    ordinal: int
    sample: int
    completion: str
    answer: str


@dataclass
class Changes:
    """What would change in a task.

    moves: verdicts that change.  rewards: completions whose reward changes and whose verdict does not.
    advantages: groups with other advantages; None for an algorithm of the user's own that has none.
    before, after: rewards of the completions that have one.
    """

    completions: int = 0
    groups: int = 0
    moves: Counter[str] = field(default_factory=Counter)
    rewards: int = 0
    advantages: int | None = 0
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def add(self, step: int, group: Group, after: Sequence[Score], answer: str, advantages: Advantages) -> None:
        """One more group, with its saved scores, and the scores and the gold answer under the other settings."""
        self.groups += 1
        self.completions += len(after)
        self.before += _rewards(group.scores)
        self.after += _rewards(after)
        for sample, (completion, old, new) in enumerate(zip(group.completions, group.scores, after, strict=True)):
            self._compare(step, group.ordinal, sample, completion, old, new, answer)
        old_advantages, new_advantages = advantages(group.scores), advantages(after)
        if self.advantages is None or old_advantages is None or new_advantages is None:
            self.advantages = None
        else:
            pairs = zip(old_advantages, new_advantages, strict=True)
            self.advantages += any(not math.isclose(a, b, abs_tol=TOLERANCE) for a, b in pairs)

    def _compare(
        self, step: int, ordinal: int, sample: int, completion: Completion, old: Score, new: Score, answer: str
    ) -> None:
        verdicts = _verdict(old), _verdict(new)
        if verdicts[0] == verdicts[1]:
            scored = verdicts[0] != "masked"
            self.rewards += scored and not math.isclose(old.reward, new.reward, abs_tol=TOLERANCE)
            return
        move = " -> ".join(verdicts)
        self.moves[move] += 1
        if self.moves[move] <= EXAMPLES:
            self.examples.append(Example(move, step, ordinal, sample, completion.text, answer))

    def as_data(self) -> dict[str, Any]:
        """Plain data; texts are a completion's own words, as they are."""
        return {
            "completions": self.completions,
            "groups": self.groups,
            "verdicts": {move: self.moves[move] for move in MOVES},
            "rewards": self.rewards,
            "advantages": self.advantages,
            "mean_reward": {"before": _mean(self.before), "after": _mean(self.after)},
            "examples": [{key: getattr(example, key) for key in Example.__slots__} for example in self.examples],
        }


def rescore_run(
    run: Path, steps: str, config: Path | None, overrides: Sequence[str], timeout_s: float | None
) -> dict[str, Changes]:
    """Scores the completions that a run was trained on again, by task.

    Args:
        steps: "A..B", or one step.
        config, overrides: other settings, of a recipe or of the run's own: `rewards`, and the tasks' `verifier` and
            `rewards`.

    Raises:
        ValueError: one line: no such run or steps, no saved groups, prompts that are not the run's, a verifier that
            cannot be loaded.
    """
    folder = RunFolder(run)
    saved = folder.saved_config()
    settings = load(config, overrides) if config is not None else changed(saved, overrides)
    settings = settings.dated(saved.data.date)
    _check_tasks(saved.data, settings.data)
    wanted = _steps(folder, steps)
    stream, tasks = _stream(saved)
    driver = checkpoint.read(folder.checkpoints).driver if checkpoint.steps(folder.checkpoints) else {}
    folder.check_data(stream, driver, Console(stderr=True).print)
    others, other_tasks = (stream, tasks) if settings.data == saved.data else _stream(settings)
    rewards = settings.rewards if timeout_s is None else settings.rewards.model_copy(update={"timeout_s": timeout_s})
    worker = RewardWorker({name: task.verifier for name, task in other_tasks.items()}, rewards)
    advantages = _advantages(saved)
    found: dict[str, Changes] = {}
    try:
        for step in track(wanted, "scoring again", console=Console(stderr=True), transient=True):
            kept = _read(folder, step, stream)
            answers = [(_prompt(others, group), [c.text for c in group.completions]) for group in kept]
            for group, (prompt, _), scores in zip(kept, answers, worker.score_answers(answers), strict=True):
                changes = found.setdefault(prompt.task, Changes())
                changes.add(step, group, scores, prompt.answer, advantages)
    finally:
        worker.close()
    return found


def show_changes(console: Console, run: Path, steps: str, found: dict[str, Changes]) -> None:
    """Prints what would change, as a table and examples."""
    moves = [move for move in MOVES if any(changes.moves[move] for changes in found.values())]
    table = Table("task", "completions", *moves, "other reward", "groups", "other advantages", "before", "after")
    for name, changes in found.items():
        means = ["none" if mean is None else f"{mean:.3f}" for mean in map(_mean, (changes.before, changes.after))]
        advantages = "unknown" if changes.advantages is None else str(changes.advantages)
        counts = (changes.completions, *(changes.moves[move] for move in moves), changes.rewards, changes.groups)
        table.add_row(escape(name), *map(str, counts), advantages, *means)
    console.print(Text(f"{run}, steps {steps}; before and after: mean reward"), soft_wrap=True)
    console.print(table)
    if not moves:
        console.print("no verdict would change")
    for name, changes in found.items():
        for example in changes.examples:
            where = f"{name}, step {example.step}, prompt {example.ordinal}, sample {example.sample}"
            said = f"{shown(example.completion)}, gold answer {shown(example.answer)}"
            console.print(Text(f"  {where}: {example.move}: {said}"), soft_wrap=True)


def _check_tasks(saved: DataConfig, settings: DataConfig) -> None:
    """Only what scores may differ: other prompts were never answered.

    Raises:
        ConfigError: naming the keys that differ.
    """
    before, after = ({**flat(data.model_dump(mode="json"), "data")} for data in (saved, settings))
    scoring = re.compile(r"data\.tasks\.\d+\.(verifier|rewards)\b")
    keys = sorted(
        key for key in before.keys() | after.keys() if before.get(key) != after.get(key) and not scoring.match(key)
    )
    if keys:
        more = f" (and {len(keys) - 3} more)" if len(keys) > 3 else ""
        raise ConfigError(
            f"these settings make other prompts than the run's: {', '.join(keys[:3])} differ{more}; "
            "only rewards, and the tasks' verifier and rewards, may"
        )


def _steps(folder: RunFolder, steps: str) -> range:
    """The steps of "A..B".

    Raises:
        ConfigError: no range, steps that the run does not have, or steps without saved groups.
    """
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", steps)
    if match is None or int(match[1]) > int(match[2] or match[1]):
        raise ConfigError(f"--steps {steps!r} is no range of steps: write A..B, such as 10..20, or one step")
    wanted = range(int(match[1]), int(match[2] or match[1]) + 1)
    known = [line["step"] for line in logs.read(folder.metrics)] if folder.metrics.is_file() else []
    if not known or wanted[0] < known[0] or wanted[-1] > known[-1]:
        has = f"steps {known[0]} to {known[-1]}" if known else "no steps"
        raise ConfigError(f"--steps {steps}: {folder.path} has {has}")
    missing = [step for step in wanted if not groups.path_of(folder.groups, step).is_file()]
    if missing:
        raise ConfigError(
            f"{folder.path} has not kept the groups of step {missing[0]}: train with checkpoint.groups=true"
        )
    return wanted


def _stream(config: RunConfig) -> tuple[PromptStream, dict[str, Task]]:
    """The prompts of a run in its order, and its tasks."""
    tasks = build_tasks(config.data)
    if config.data.max_prompt_tokens is not None:  # the policy's tokenizer says which prompts are left out
        ensure_models(config)
        tasks = check_prompts(config, tasks, lambda note: None)
    return PromptStream(tasks, config.data), tasks


def _read(folder: RunFolder, step: int, stream: PromptStream) -> list[Group]:
    try:
        return groups.read(folder.groups, step, stream.prompt)
    except (EOFError, OSError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{groups.path_of(folder.groups, step)} cannot be read: {error}") from error


def _prompt(stream: PromptStream, group: Group) -> Prompt:
    """A group's prompt as other settings make it, whose gold answer may be spelled otherwise.

    Raises:
        ConfigError: when it has another text.
    """
    level = group.prompt.payload.get("level")
    prompt = stream.prompt(group.ordinal, level if isinstance(level, int) else None)
    if prompt.text != group.prompt.text:
        raise ConfigError(f"prompt {group.ordinal} of task {prompt.task!r} is another one in these settings")
    return prompt


def _advantages(config: RunConfig) -> Advantages:
    """Advantages of a group's scores by the run's algorithm, without what a KL in the reward adds to them."""
    algorithm = build_algorithm(config.algorithm)

    def advantages(scores: Sequence[Score]) -> list[float] | None:
        if not hasattr(algorithm, "advantages"):
            return None
        rewards = torch.tensor([[score.reward for score in scores]], dtype=torch.float64).nan_to_num()
        ok = torch.tensor([[score.status is RewardStatus.OK for score in scores]])
        found: list[float] = algorithm.advantages(rewards, ok)[0].tolist()
        return found

    return advantages


def _verdict(score: Score) -> str:
    """`right`, `wrong` or `masked`."""
    if score.status is not RewardStatus.OK:
        return "masked"
    return "right" if is_right(score.right) else "wrong"


def _rewards(scores: Sequence[Score]) -> Iterator[float]:
    return (score.reward for score in scores if score.status is RewardStatus.OK)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
