"""Turning a question into a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewards.config import DataConfig, TaskConfig
from rewards.verify import RewardsError
from rollout.types import Message, Prompt


def prompt_of(
    task: TaskConfig,
    data: DataConfig,
    *,
    question: str,
    answer: str,
    payload: dict[str, Any],
    parts: Sequence[str] = (),
) -> Prompt:
    """One entry of a task: a user message under the template, behind the system message if there is one.

    `ordinal` is set when pools are built.

    parts: the questions of a composed task's parts.

    Raises:
        RewardsError: when `data.system` names nothing.
    """
    template = data.template if task.template is None else task.template
    fields = {"question": question.strip()} | {f"part{n}": part.strip() for n, part in enumerate(parts, start=1)}
    user = Message(role="user", content=filled(template, fields))
    if "{question}" not in template:  # what stands in the message in place of the question
        question = filled(between_fields(template), fields)
    system = () if data.system is None else (Message(role="system", content=system_prompt(data.system)),)
    return Prompt(
        ordinal=0,
        task=task.name,
        messages=(*system, user),
        answer=answer,
        payload=payload | {"question": question.strip()},
    )


def filled(template: str, fields: Mapping[str, str]) -> str:
    """The template with every `{name}` of these fields filled in; what they say is not read as a template."""
    return re.sub(r"{(\w+)}", lambda found: fields.get(found[1], found[0]), template)


def between_fields(template: str) -> str:
    """A template of a composed task from its first `{part1}`, `{part2}` or `{part3}` to its last."""
    spans = [found.span() for found in re.finditer(r"{part[0-9]+}", template)]
    return template[spans[0][0] : spans[-1][1]]


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
