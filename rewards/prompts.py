"""Turning a question into a prompt."""

from __future__ import annotations

from typing import Any

from rewards.config import DataConfig, TaskConfig
from rollout.types import Message, Prompt


def prompt_of(task: TaskConfig, data: DataConfig, *, question: str, answer: str, payload: dict[str, Any]) -> Prompt:
    """One entry of a task, as a single user message under the template; `ordinal` is set when pools are built."""
    text = data.template.replace("{question}", question.strip())
    return Prompt(
        ordinal=0,
        task=task.name,
        messages=(Message(role="user", content=text),),
        answer=answer,
        payload=payload | {"question": question.strip()},
    )
