"""Tasks made of other tasks: their questions in one prompt, and one answer made of their integer answers."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from rewards.config import DataConfig, TaskConfig
from rewards.forms import FORMS, FormVerifier
from rewards.prompts import between_fields, filled, prompt_of
from rewards.splits import Balance, shares, split_in, within
from rewards.verify import ExactInteger, RewardsError, Verifier, integer
from rollout.types import Prompt

_COUNT = {2: "two", 3: "three"}


def composed_entries(
    task: TaskConfig, data: DataConfig, parts: Sequence[tuple[TaskConfig, Sequence[Prompt]]]
) -> list[Prompt]:
    """`task.size` compositions of entries of the part tasks.

    parts: each part task with all its entries, of any split.  Each part is drawn as its own `answers` says.  With
        `split_by: entry` of any split, since what is held out is decided by the composed text alone; with `question`
        all of a composition are of one split, which is then the composition's.

    Raises:
        RewardsError: when a part has no integer answers, or none that can be written in the operation's form.
    """
    usable = [_usable(task, part, entries) for part, entries in parts]
    if data.split_by == "entry":
        return _compositions(task, data, parts, usable, usable, task.size, "")
    composed = []
    for split, size in shares(task.size, data).items():
        columns = [[entry for entry in column if split_in(entry, data) == split] for column in usable]
        if all(columns):
            composed += _compositions(task, data, parts, usable, columns, size, split)
    return composed


def composed_verifier(task: TaskConfig) -> Verifier:
    """What judges answers to compositions: an integer and nothing else, or the operation's form."""
    return FormVerifier(task.operation) if task.operation in FORMS else ExactInteger()


def wordings(data: DataConfig) -> list[tuple[str, str, tuple[str, ...]]]:
    """How the messages of tasks are made that are not a question under `data.template` and nothing else.

    Each is the message and the question in it, both in the fields `{question}`, or `{part1}`, `{part2}`, ..., and the
    names of the parts.
    """
    found = []
    for task in data.tasks:
        if task.compose is not None:
            template, whole = task.template or data.template, _question(task)
            asked = whole if "{question}" in template else between_fields(template)
            found.append((template.replace("{question}", whole), asked, task.compose))
        elif task.template is not None:
            found.append((task.template, "{question}", ()))
    return found


def combine(operation: str, answers: Sequence[int]) -> str:
    """The composed answer: the sum, the largest, the first minus all others, or one in another form."""
    if operation in FORMS:
        return FORMS[operation].write(*answers) or ""
    if operation == "sum":
        return str(sum(answers))
    return str(max(answers) if operation == "maximum" else answers[0] - sum(answers[1:]))


def _usable(task: TaskConfig, part: TaskConfig, entries: Sequence[Prompt]) -> list[Prompt]:
    """The part's entries whose answers are integers that the operation takes."""
    numbered = [entry for entry in within(entries, part.answers) if integer(entry.answer) is not None]
    if not numbered:
        raise RewardsError(f"task {task.name!r}: its part {part.name!r} has no entries with an integer answer")
    usable = [entry for entry in numbered if len(task.compose or ()) > 1 or combine(task.operation, [_value(entry)])]
    if not usable:
        raise RewardsError(
            f"task {task.name!r}: operation {task.operation} can write none of the answers of its part {part.name!r}: "
            "set operation to another"
        )
    return usable


def _compositions(
    task: TaskConfig,
    data: DataConfig,
    parts: Sequence[tuple[TaskConfig, Sequence[Prompt]]],
    raw: Sequence[Sequence[Prompt]],
    columns: Sequence[Sequence[Prompt]],
    size: int,
    split: str,
) -> list[Prompt]:
    """`size` compositions, each of one entry of every column.

    raw: for each column, the entries by whose answers' frequencies it is balanced.
    split: that all the entries are of; empty where they are of any.
    """
    drawn = []
    for position, ((part, _), whole, column) in enumerate(zip(parts, raw, columns, strict=True)):
        rng = Random(f"{data.seed}/{task.name}/part {position}" + (f"/{split}" if split else ""))
        drawn.append(Balance(whole, part.answers.balance if part.answers else 1.0).resample(column, size, rng))
    return [_compose(task, data, row, split) for row in zip(*drawn, strict=True)]


def _compose(task: TaskConfig, data: DataConfig, row: Sequence[Prompt], split: str) -> Prompt:
    parts = [{"task": entry.task, "question": entry.payload["question"], "answer": entry.answer} for entry in row]
    questions = [part["question"] for part in parts]
    return prompt_of(
        task,
        data,
        question=filled(_question(task), {f"part{n}": text for n, text in enumerate(questions, start=1)}),
        answer=combine(task.operation, [_value(entry) for entry in row]),
        payload={"parts": parts, "operation": task.operation} | ({"split": split} if split else {}),
        parts=questions,
    )


def _question(task: TaskConfig) -> str:
    """A composed task's question, in the fields `{part1}`, `{part2}`, `{part3}`."""
    count = len(task.compose or ())
    lines = ["{part1}"] if count == 1 else [f"Problem {number}: {{part{number}}}" for number in range(1, count + 1)]
    return "\n".join([*lines, _request(task.operation, count)])


def _request(operation: str, count: int) -> str:
    if operation in FORMS:
        return FORMS[operation].request
    if operation == "sum":
        return f"What is the sum of the {_COUNT[count]} answers?"
    if operation == "maximum":
        return f"What is the largest of the {_COUNT[count]} answers?"
    return f"What is the first answer minus the {'second' if count == 2 else 'sum of the other two'}?"


def _value(entry: Prompt) -> int:
    return int(entry.answer)
