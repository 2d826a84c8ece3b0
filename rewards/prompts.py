"""Turning a question into a prompt."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from rewards.config import DataConfig, TaskConfig
from rewards.verify import RewardsError
from rollout.types import Message, Prompt


def prompt_of(task: TaskConfig, data: DataConfig, *, question: str, answer: str, payload: dict[str, Any]) -> Prompt:
    """One entry of a task: a user message under the template, behind the system message if there is one.

    `ordinal` is set when pools are built.

    Raises:
        RewardsError: when `data.system` names nothing.
    """
    user = Message(role="user", content=data.template.replace("{question}", question.strip()))
    system = () if data.system is None else (Message(role="system", content=system_prompt(data.system)),)
    return Prompt(
        ordinal=0,
        task=task.name,
        messages=(*system, user),
        answer=answer,
        payload=payload | {"question": question.strip()},
    )


@lru_cache
def system_prompt(name: str) -> str:
    """The text of one of Reasoning Gym's system prompts, or of a file.

    Raises:
        RewardsError: when it is neither.
    """
    from reasoning_gym.utils import SYSTEM_PROMPTS

    if name in SYSTEM_PROMPTS:
        return str(SYSTEM_PROMPTS[name]).strip()
    try:
        return Path(name).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RewardsError(
            f"data.system: {name!r} is none of {', '.join(SYSTEM_PROMPTS)}, and no text file that can be read: {error}"
        ) from error
