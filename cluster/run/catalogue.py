"""Tasks to look at, and verifiers to try out before a run trusts them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cluster.config import ConfigError, load
from rewards.attack import CANARY, VERDICTS, Case, Finding, Tally, battery, known_good, shown
from rewards.config import DataConfig, RewardsConfig, TaskConfig
from rewards.generation import one_generator
from rewards.gym import categories
from rewards.pool import LATE_IN_A_ROW
from rewards.sources import all_entries, build_tasks
from rewards.splits import SPLITS, questions_of
from rewards.verify import RewardsError, Verifier
from rewards.worker import RewardWorker
from rollout.types import Prompt

SHOWN = 160  # characters of a prompt in the list
BATCH, BATCH_CHARACTERS = 500, 4_000_000  # completions of the battery that are scored together, at most
HOSTILE_BATCH = LATE_IN_A_ROW - 1  # of completions made to be late, so few that none is left out because of others


@dataclass(frozen=True)
class Example:
    """A data set with one of its entries; `problem` is why it has none."""

    name: str
    category: str
    prompt: str = ""
    answer: str = ""
    problem: str = ""


def list_tasks(console: Console, category: str | None, as_json: bool) -> None:
    """All Reasoning Gym data sets, each with an example.

    Raises:
        ConfigError: when there is no such category.
    """
    known = categories()
    if category is not None and category not in known:
        raise ConfigError(f"Reasoning Gym has no category {category!r}: it has {', '.join(sorted(known))}")
    names = [(kind, name) for kind, members in sorted(known.items()) if category in (None, kind) for name in members]
    with one_generator(), Progress(console=console, transient=True, disable=as_json) as progress:
        found = [_example(kind, name) for kind, name in progress.track(names, description="one example each")]
    if as_json:
        print(json.dumps([vars(example) for example in found], indent=1))
        return
    table = Table("category", "task", "prompt", "answer", show_lines=True)
    for example in found:
        shown = example.prompt if len(example.prompt) <= SHOWN else example.prompt[:SHOWN] + " …"
        answer = example.answer or "[dim]any that the task accepts[/]"
        cells = (shown, answer) if not example.problem else (f"cannot be generated: {example.problem}", "")
        table.add_row(
            example.category, example.name, escape(cells[0]), cells[1] if not example.answer else escape(answer)
        )
    console.print(table)
    console.print(f"{len(found)} tasks; musketeers tasks show NAME renders some prompts", highlight=False)


def _example(category: str, name: str) -> Example:
    try:
        (entry,) = all_entries(*_alone(name, seed=0, size=1, level=None))[0]
    except RewardsError as error:
        return Example(name, category, problem=str(error))
    return Example(name, category, entry.payload["question"], entry.answer)


def show_task(console: Console, name: str, config: Path | None, seed: int, count: int, level: int | None) -> None:
    """Renders some prompts of a task as a model reads them, with their answers."""
    entries, _ = _find(name, config, seed, count, level)
    for index, prompt in enumerate(entries[:count]):
        console.rule(f"{name}, index {index}")
        for message in prompt.messages:
            console.print(f"[bold]{message['role']}[/]", highlight=False)
            console.print(message["content"], highlight=False, markup=False)
        answer = prompt.answer or "any that the task accepts"
        console.print(f"[bold]answer[/] {escape(answer)}", highlight=False)


def score_file(
    name: str, config: Path | None, seed: int, source: Path, rewards: RewardsConfig, level: int | None
) -> Iterator[dict[str, Any]]:
    """Scores a file of completions through a reward worker.

    Args:
        source: JSON lines with `index`, the entry's position in the task, and `completion`.

    Yields:
        `index`, `reward`, `status` and `reason` of each line, in its order.

    Raises:
        ConfigError: naming the file's line that cannot be used.
    """
    wanted = _read_completions(source)
    size = max((index for index, _ in wanted), default=0) + 1
    entries, verifier = _find(name, config, seed, size, level)
    for number, (index, _) in enumerate(wanted, start=1):
        if index >= len(entries):
            raise ConfigError(f"{source}, line {number}: {name} has no entry {index}: it has {len(entries)}")
    worker = RewardWorker({entries[0].task: verifier}, rewards)
    try:
        for start in range(0, len(wanted), 1000):
            chunk = wanted[start : start + 1000]
            scores = worker.score_texts([(entries[index], completion) for index, completion in chunk])
            for (index, _), score in zip(chunk, scores, strict=True):
                yield {"index": index, "reward": score.reward, "status": score.status.value, "reason": score.reason}
    finally:
        worker.close()


def attack_task(
    name: str,
    config: Path | None,
    overrides: Sequence[str],
    seed: int,
    count: int,
    level: int | None,
    timeout_s: float | None,
) -> Tally:
    """Tries the battery of `rewards.attack` on a task's verifier, over its first `count` entries, as a run would score.

    config, overrides: a recipe, whose `rewards` section counts; without one the defaults do.

    Raises:
        ConfigError: no such task, or overrides without a recipe.
    """
    if overrides and config is None:
        raise ConfigError(f"{overrides[0]!r} overrides a recipe: give --config RECIPE too")
    rewards = RewardsConfig() if config is None else load(config, overrides).rewards
    changes = {"on_timeout": "mask", "processes": 1} | ({} if timeout_s is None else {"timeout_s": timeout_s})
    chosen, data = _chosen(name, config, seed, count, level, overrides)
    if chosen.dataset is not None and chosen.curriculum is None:
        chosen = chosen.model_copy(update={"size": min(chosen.size, count)})  # making all of them can take minutes
    entries, verifier = all_entries(chosen, data)
    entries = entries[:count]
    if not entries:
        raise ConfigError(f"task {name!r} has no entries to try")
    batches = list(_batches(battery(entries, [known_good(verifier, prompt) for prompt in entries])))
    tally = Tally(len(entries))
    worker = RewardWorker({entries[0].task: verifier}, rewards.model_copy(update=changes))
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for batch in progress.track(batches, description="trying the battery"):
                scores = worker.score_texts([(entries[case.index], case.completion) for case in batch])
                for case, score in zip(batch, scores, strict=True):
                    tally.add(case, score)
    finally:
        worker.close()
        tally.executed |= CANARY.exists()
        CANARY.unlink(missing_ok=True)
    return tally


def _batches(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """The cases in lists of limited number and length."""
    batch: list[Case] = []
    characters = 0
    for case in cases:
        most = HOSTILE_BATCH if batch and batch[0].kind == "hostile" else BATCH
        if batch and (len(batch) >= most or characters + len(case.completion) > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(case)
        characters += len(case.completion)
    if batch:
        yield batch


def show_attack(console: Console, name: str, tally: Tally) -> None:
    """Prints what came of an attack; what a completion or a verifier says is shown as printable ASCII."""
    table = Table("completions", "number", *VERDICTS, title=f"{escape(name)}: {tally.entries} prompts")
    for kind, counts in tally.counts.items():
        table.add_row(kind, str(counts.total()), *(str(counts[verdict]) for verdict in VERDICTS))
    console.print(table)
    for title, findings in (
        ("wrong answers that scored right", tally.false_positives),
        ("right answers that scored wrong", tally.false_negatives),
        ("completions without a verdict", tally.masked),
    ):
        console.print(f"{title}: {len(findings) or 'none'}", highlight=False)
        forms = Counter((found.kind, found.form) for found in findings)
        firsts = {(found.kind, found.form): found for found in reversed(findings)}
        for form, times in forms.most_common():
            console.print(Text(_line(firsts[form], times)), soft_wrap=True)
    if tally.executed:
        console.print("[bold red]a completion was executed:[/] this verifier runs what it is given", highlight=False)
    answer, reward = tally.best_constant()
    console.print(Text(f"a policy that always answers {shown(answer)} earns {reward:.2f}"), soft_wrap=True)


def _line(found: Finding, times: int) -> str:
    form = f" ({found.form})" if found.kind in ("hostile", "noise", "echo") else ""  # others show what they are
    reason = f": {shown(found.reason, 100)}" if found.reason else ""
    completion = shown(found.completion, characters=found.characters)
    return f"  {times} x {found.kind}{form}, as for prompt {found.index}: {completion}{reason}"


def show_recipe(console: Console, config: Path, examples: int) -> None:
    """A recipe's own tasks: how many prompts they have, and examples."""
    table = Table("task", "train", "validation", "test", "prompt", "answer", show_lines=True)
    for name, task in build_tasks(load(config).data).items():
        for index, prompt in enumerate(task.train[:examples]):
            counts = [str(len(split)) for split in (task.train, task.validation, task.test)] if not index else [""] * 3
            table.add_row(name if not index else "", *counts, escape(prompt.text), escape(prompt.answer))
    console.print(table)


def exported(config: Path, overrides: Sequence[str], split: str | None) -> Iterator[dict[str, Any]]:
    """Every prompt of a recipe's pools, those of `split` alone if one is named, with the questions in it.

    `ordinal` is the position in the task's pool.  Prompts of more than `data.max_prompt_tokens` are among them: what is
    too long is the policy's matter.

    Raises:
        ConfigError: when there is no such split.
    """
    if split not in (None, *SPLITS):
        raise ConfigError(f"--split {split}: it is one of {', '.join(SPLITS)}")
    for name, task in build_tasks(load(config, overrides).data).items():
        for where in SPLITS if split is None else (split,):
            for prompt in getattr(task, where):
                at = {"task": name, "split": where, "ordinal": prompt.ordinal}
                yield at | {"text": prompt.text, "answer": prompt.answer, "parts": questions_of(prompt)}


def _read_completions(source: Path) -> list[tuple[int, str]]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            index, completion = row["index"], row["completion"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{source}, line {number}: needs index and completion as JSON ({error})") from error
        if not isinstance(index, int) or isinstance(index, bool) or index < 0 or not isinstance(completion, str):
            raise ConfigError(f"{source}, line {number}: index must be a position from 0, completion a text")
        found.append((index, completion))
    return found


def _find(name: str, config: Path | None, seed: int, size: int, level: int | None) -> tuple[Sequence[Prompt], Verifier]:
    """Entries and verifier of a Reasoning Gym data set, or of a task of a recipe."""
    return all_entries(*_chosen(name, config, seed, size, level))


def _chosen(
    name: str, config: Path | None, seed: int, size: int, level: int | None, overrides: Sequence[str] = ()
) -> tuple[TaskConfig, DataConfig]:
    if config is None:
        return _alone(name, seed, size, level)
    data = load(config, overrides).data.model_copy(update={"seed": seed})
    by_name: Mapping[str, TaskConfig] = {task.name: task for task in data.tasks}
    if name not in by_name:
        raise ConfigError(f"{config} has no task {name!r}: it has {', '.join(by_name)}")
    return by_name[name], data


def _alone(name: str, seed: int, size: int, level: int | None) -> tuple[TaskConfig, DataConfig]:
    task = TaskConfig(name=name, dataset=name, size=size, level=level)
    return task, DataConfig(seed=seed, tasks=(task,))
