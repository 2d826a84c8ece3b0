"""Tasks made of other tasks: several questions in one prompt, their integer answers combined."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from rewards.config import DataConfig, TaskConfig
from rewards.prompts import prompt_of
from rewards.splits import Balance, within
from rewards.verify import RewardsError, integer
from rollout.types import Prompt

_COUNT = {2: "two", 3: "three"}


def composed_entries(
    task: TaskConfig, data: DataConfig, parts: Sequence[tuple[TaskConfig, Sequence[Prompt]]]
) -> list[Prompt]:
    """`task.size` compositions of entries of the part tasks.

    parts: each part task with all its entries, of any split: what is held out is decided by the
        composed text alone.  Each part is drawn as its own `answers` says.

    Raises:
        RewardsError: when the number of parts is not 2 or 3, or a part has no integer answers.
    """
    if len(parts) not in _COUNT:
        raise RewardsError(f"task {task.name!r}: compose takes 2 or 3 tasks, got {len(parts)}")
    columns = []
    for position, (part, entries) in enumerate(parts):
        usable = [entry for entry in within(entries, part.answers) if integer(entry.answer) is not None]
        if not usable:
            raise RewardsError(f"task {task.name!r}: its part {part.name!r} has no entries with an integer answer")
        rng = Random(f"{data.seed}/{task.name}/part {position}")
        columns.append(Balance(usable, part.answers.balance if part.answers else 1.0).resample(usable, task.size, rng))
    return [_compose(task, data, row) for row in zip(*columns, strict=True)]


def _compose(task: TaskConfig, data: DataConfig, row: Sequence[Prompt]) -> Prompt:
    lines = [f"Problem {number}: {entry.payload['question']}" for number, entry in enumerate(row, start=1)]
    parts = [{"task": entry.task, "question": entry.payload["question"], "answer": entry.answer} for entry in row]
    return prompt_of(
        task,
        data,
        question="\n".join([*lines, _request(task.operation, len(row))]),
        answer=str(combine(task.operation, [int(entry.answer) for entry in row])),
        payload={"parts": parts, "operation": task.operation},
    )


def _request(operation: str, count: int) -> str:
    if operation == "sum":
        return f"What is the sum of the {_COUNT[count]} answers?"
    if operation == "maximum":
        return f"What is the largest of the {_COUNT[count]} answers?"
    return f"What is the first answer minus the {'second' if count == 2 else 'sum of the other two'}?"


def combine(operation: str, answers: Sequence[int]) -> int:
    """The composed answer: the sum, the largest, or the first minus all others."""
    if operation == "sum":
        return sum(answers)
    if operation == "maximum":
        return max(answers)
    return answers[0] - sum(answers[1:])
