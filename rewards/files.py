"""Word problems in GSM8K's format: columns `question` and `answer`, the answer ending in "#### 42"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rewards.config import DataConfig, TaskConfig
from rewards.prompts import prompt_of
from rewards.splits import split_of
from rewards.verify import RewardsError
from rollout.types import Prompt

HUB = "openai/gsm8k"
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_FRACTION = r"\\[dt]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}"
_DECIMAL = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\d)])-)?\s*(?:\$\s*-?\s*)?(?:{_FRACTION}|(?:{_DECIMAL})(?:\s*/\s*\d+)?)")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKED = re.compile(r"####\s*([^\n]*)")
_SPOKEN = re.compile(r"answer\s+is\s*:?(?=([^\n]*))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class NumberVerifier:
    """Scores 1 when the completion's final number equals the gold answer exactly, else 0."""

    def score(self, completion: str, prompt: Prompt) -> float:
        """1.0 or 0.0."""
        given = final_number(completion)
        return float(given is not None and given == number(prompt.answer))


def final_number(text: str) -> Fraction | None:
    r"""The number that a solution ends with.

    Looked for in this order: the last \boxed{}, the last "####", the last "answer is", and only if
    none of them is there the last number of the text.
    """
    for marker in (_BOXED, _MARKED, _SPOKEN):
        if found := marker.findall(text):
            first = _NUMBER.search(found[-1])
            return number(first.group()) if first else None
    numbers = _NUMBER.findall(text)
    return number(numbers[-1]) if numbers else None


def number(text: str) -> Fraction | None:
    r"""The exact value of "1,000", "$1,000", "1000.0", "3/4" or "\frac{3}{4}"; None for anything else."""
    plain = re.sub(r"[\s$,]", "", text).rstrip(".")
    if found := re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", plain):
        plain = "{}{}/{}".format(*found.groups())
    top, _, bottom = plain.partition("/")
    try:
        return Fraction(top) / Fraction(bottom or "1")
    except (ValueError, ZeroDivisionError):
        return None


def gsm8k_entries(task: TaskConfig, data: DataConfig) -> list[Prompt]:
    """The first `task.size` problems of the file, or of the public data set when `path` is openai/gsm8k.

    The public data set's own test split stays the test split, so that results can be compared with
    published ones; its training split gives train and validation.

    Raises:
        RewardsError: missing or unreadable file, missing column, an answer that is no number.
    """
    assert task.path is not None
    if task.path == HUB:
        return _public(task, data)
    return [_entry(task, data, row, index) for index, row in enumerate(_rows(task, task.path)[: task.size])]


def _public(task: TaskConfig, data: DataConfig) -> list[Prompt]:
    from datasets import load_dataset  # slow to import, and the scoring process never needs it

    try:
        splits = load_dataset(HUB, "main")
    except (OSError, ValueError) as error:
        raise RewardsError(f"task {task.name!r}: cannot load {HUB} ({error}); give path a local file") from error
    entries = []
    for split in ("train", "test"):
        for index, row in enumerate(splits[split]):
            entry = _entry(task, data, row, index)
            held_out = "validation" if split_of(entry.text, data) == "validation" else "train"
            entry.payload["split"] = "test" if split == "test" else held_out
            entries.append(entry)
    return entries


def _rows(task: TaskConfig, name: str) -> list[dict[str, Any]]:
    path = Path(name).expanduser()
    if path.suffix not in _FORMATS:
        raise RewardsError(f"task {task.name!r}: path {name!r} is neither .jsonl, .json, .parquet nor {HUB}")
    if not path.is_file():
        raise RewardsError(f"task {task.name!r}: there is no file {name!r} (path is relative to where you start)")
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return list(load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train"))
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise RewardsError(f"task {task.name!r}: cannot read {name!r}: {error.__cause__ or error}") from error


def _entry(task: TaskConfig, data: DataConfig, row: dict[str, Any], index: int) -> Prompt:
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str):
            raise RewardsError(f"task {task.name!r}: row {index} of {task.path} has no text in column {column!r}")
    gold = row["answer"].rpartition("####")[2].strip()
    if number(gold) is None:
        raise RewardsError(f"task {task.name!r}: row {index} of {task.path}: answer {gold!r} is no number")
    return prompt_of(
        task, data, question=row["question"], answer=gold.replace(",", ""), payload={"solution": row["answer"]}
    )
