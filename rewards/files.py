"""Tasks from files and from the Hugging Face hub, through `datasets`: a column of questions, one of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewards.config import DataConfig, TaskConfig
from rewards.numbers import NumberVerifier, number
from rewards.prompts import prompt_of
from rewards.splits import split_in
from rewards.verifiers import MathVerifier, TextVerifier
from rewards.verify import ExactInteger, RewardsError, Verifier, integer
from rollout.types import Prompt

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_LONGEST_SHOWN = 80  # characters of an answer that a message repeats
_TEXT_VERIFIERS: dict[str, Verifier] = {
    "number": NumberVerifier(), "math": MathVerifier(), "text": TextVerifier(), "integer": ExactInteger()
}  # fmt: skip
_CONFIGURATIONS = {"openai/gsm8k": "main"}  # of data sets that have several, where one is the usual


def file_entries(task: TaskConfig, data: DataConfig) -> list[Prompt]:
    """The first `task.size` rows of a local file.

    Raises:
        RewardsError: missing or unreadable file, missing column, an answer that the verifier cannot compare.
    """
    assert task.path is not None
    path = Path(task.path).expanduser()
    if path.suffix not in _FORMATS:
        raise RewardsError(
            f"task {task.name!r}: path {task.path!r} ends in none of {', '.join(_FORMATS)}; "
            "a data set of the Hugging Face hub goes into hub"
        )
    if not path.is_file():
        raise RewardsError(f"task {task.name!r}: there is no file {task.path!r} (path is relative to where you start)")
    from datasets import load_dataset  # slow to import, and the scoring process never needs it
    from datasets.exceptions import DatasetGenerationError

    try:
        rows = load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise RewardsError(f"task {task.name!r}: cannot read {task.path!r}: {error.__cause__ or error}") from error
    count = min(task.size, len(rows))
    return [
        _entry(task, data, row, f"row {index} of {task.path}") for index, row in enumerate(rows.select(range(count)))
    ]


def hub_entries(task: TaskConfig, data: DataConfig) -> list[Prompt]:
    """At most `task.size` rows of each split of a data set of the hub.

    The data set's own test split stays the test split, so that results can be compared with published ones, and
    so does its validation split; the rest, or all where it has no such splits, is split by the prompts' text.

    Raises:
        RewardsError: see `file_entries`; also when the hub cannot be reached.
    """
    assert task.hub is not None
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    name, _, configuration = task.hub.partition(":")
    try:
        splits = load_dataset(name, configuration or _CONFIGURATIONS.get(name))
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        reason = " ".join(str(error).split())
        raise RewardsError(f"task {task.name!r}: cannot load {task.hub} ({reason}); give path a local file") from error
    held_out = {split for split in ("validation", "test") if split in splits}
    entries = []
    for split, rows in splits.items():
        for index, row in enumerate(rows.select(range(min(task.size, len(rows))))):
            entry = _entry(task, data, row, f"row {index} of {task.hub}, split {split}")
            own = split_in(entry, data)
            # What the data set holds out stays so; of the rest only what it does not hold out itself is held out.
            entry.payload["split"] = split if split in held_out else "train" if own in held_out else own
            entries.append(entry)
    return entries


def _entry(task: TaskConfig, data: DataConfig, row: dict[str, Any], where: str) -> Prompt:
    columns = task.columns
    for column in (columns.question, columns.answer):
        if not isinstance(row.get(column), (str, int, float)) or isinstance(row.get(column), bool):
            raise RewardsError(
                f"task {task.name!r}: {where} has no text in column {column!r}, only in {', '.join(row)}: "
                "set columns.question and columns.answer"
            )
    solution = str(row[columns.answer])
    gold = (solution.rpartition(columns.marker)[2] if columns.marker else solution).strip()
    if task.verifier in (None, "number"):
        if number(gold) is None:
            raise RewardsError(
                f"task {task.name!r}: {where}: answer {_shown(gold)} is no number; "
                "set verifier to math, text or your own (a number has at most 1,000 digits)"
            )
        gold = gold.replace(",", "")
    if task.verifier == "integer" and integer(gold) is None:
        raise RewardsError(f"task {task.name!r}: {where}: answer {_shown(gold)} is no integer; set verifier to number")
    prompt = prompt_of(task, data, question=str(row[columns.question]), answer=gold, payload={"solution": solution})
    verifier = _TEXT_VERIFIERS.get(task.verifier or "number")
    if verifier is not None and verifier.score(gold, prompt) != 1.0:
        raise RewardsError(
            f"task {task.name!r}: {where}: verifier {task.verifier or 'number'} does not take the answer "
            f"{_shown(gold)} itself for right; set verifier to another or leave the row out"
        )
    return prompt


def _shown(gold: str) -> str:
    return repr(gold if len(gold) <= _LONGEST_SHOWN else gold[:_LONGEST_SHOWN] + "…")
