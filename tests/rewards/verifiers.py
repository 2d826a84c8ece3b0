"""Verifiers and plug-ins that behave badly, importable by the scoring process."""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rewards import Unreadable
from rewards.config import DataConfig, TaskConfig
from rollout.types import Message, Prompt


def a_prompt(task: str = "task", text: str = "1 + 1 =", answer: str = "2", ordinal: int = 0) -> Prompt:
    return Prompt(ordinal=ordinal, task=task, messages=(Message(role="user", content=text),), answer=answer)


class Obedient:
    """Does what the completion says."""

    kept: ClassVar[list[bytes]] = []

    def score(self, completion: str, prompt: Prompt) -> Any:
        command, _, argument = completion.partition(" ")
        if command == "sleep":
            time.sleep(float(argument))
            return 1.0
        if command == "regex":  # catastrophic backtracking: never gives up the interpreter
            return float(bool(re.fullmatch(r"(a+)+b", "a" * 60)))
        if command == "eat":
            return float(len(bytearray(int(argument) * 2**20)) > 0)
        if command == "keep":
            size, count = map(int, argument.split())
            self.kept.extend(bytes(size) for _ in range(count))
            return 1.0
        if command in _RAISED:
            raise _RAISED[command](argument)
        if command == "spoil":
            type(self).score = lambda *_: 1.0  # type: ignore[method-assign]
            raise KeyError
        if command == "exit":
            sys.exit(3)
        if command == "die":
            os._exit(int(argument))
        if command == "imported":
            return float(argument in sys.modules)
        if command == "child":  # something that would outlive a verifier that is killed alone
            Path(argument).write_text(str(os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")))
            time.sleep(60)
        return (
            {"nan": float("nan"), "text": "1", "none": None, "huge": 10**400}.get(command)
            if command in _ODD
            else float(command)
        )


_RAISED = {"raise": LookupError, "unreadable": Unreadable, "key": KeyError}
_ODD = {"nan", "text", "none", "huge"}


@dataclass(frozen=True)
class Knowing(Obedient):
    """One that knows a right answer, or believes that it does."""

    answer: str | None

    def known_good(self, prompt: Prompt) -> str | None:
        return self.answer


class Unloadable:
    """Pickles, but cannot be loaded again."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return _refuse, ("the model file is missing",)

    def score(self, completion: str, prompt: Prompt) -> float:
        return 1.0


def _refuse(message: str) -> None:
    raise FileNotFoundError(message)


class Doubles:
    """A plug-in: double a number."""

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.size = task.size

    def entries(self) -> list[Prompt]:
        return [a_prompt(text=f"2 * {n} =", answer=str(2 * n)) for n in range(self.size)]

    def score(self, completion: str, prompt: Prompt) -> float:
        return float(completion.strip() == prompt.answer)


class WithoutEntries:
    def __init__(self, task: TaskConfig, data: DataConfig) -> None: ...

    def score(self, completion: str, prompt: Prompt) -> float:
        return 0.0


class Unpicklable(Doubles):
    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        super().__init__(task, data)
        self.hook = lambda: None


def finds_gold(completion: str, prompt: Prompt) -> float:
    """Right wherever the gold answer stands: hedging pays."""
    return float(prompt.answer in completion)


def likes_zero(completion: str, prompt: Prompt) -> float:
    """Knows the gold answer, and takes a zero for it too."""
    return float(completion.strip() in (prompt.answer, "0"))


def chokes(completion: str, prompt: Prompt) -> float:
    """Fails on some, in their own words."""
    if "\x1b" in completion or "{" in completion or "[bold" in completion:
        raise LookupError(completion)
    return float(completion.strip() == prompt.answer)


def evaluates(completion: str, prompt: Prompt) -> float:
    """Runs what it is given."""
    try:
        return float(str(eval(completion)) == prompt.answer)
    except (Exception, SystemExit):  # noqa: BLE001 - whatever the text raises
        return 0.0


class Trained(Doubles):
    """Whose own splits hold nothing out."""

    def entries(self) -> list[Prompt]:
        return [replace(entry, payload=entry.payload | {"split": "train"}) for entry in super().entries()]
