"""Output-level collaboration: the experts' answers as text in the policy's prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from experts.chat import Chat
from rollout.types import Message

ANSWERS, PROMPT = "answers", "prompt"


def with_answers(template: str, messages: Sequence[Message], answers: Mapping[str, str]) -> tuple[Message, ...]:
    """The messages with the last one's content replaced by the template's.

    answers: by the expert's name.
    """
    *before, last = messages
    known = {ANSWERS: "\n".join(f"{name}: {answer}" for name, answer in answers.items()), **answers}
    known[PROMPT] = last["content"]
    pattern = "|".join(re.escape("{" + name + "}") for name in known)
    content = re.sub(pattern, lambda found: known[found.group()[1:-1]], template)
    return (*before, Message(role=last["role"], content=content))


def cut(answer: str, chat: Chat, tokens: int) -> str:
    """At most so many tokens of an answer as the policy counts them, which may be more than the expert's own."""
    given = chat.text_tokens(answer)
    if len(given) <= tokens:
        return answer
    # What is cut between the bytes of a character counts for more than before.
    for length in range(tokens, 0, -1):
        kept = chat.tokenizer.decode(given[:length])
        if len(chat.text_tokens(kept)) <= tokens:
            return kept
    return ""


def in_front(template: str, answers: Mapping[str, str]) -> str:
    """What the template puts in front of the prompt."""
    front = template.partition("{" + PROMPT + "}")[0]
    (message,) = with_answers(front, [Message(role="user", content="")], answers)
    return message["content"]


def unknown_fields(template: str, experts: Sequence[str]) -> list[str]:
    """Names in braces that are none of the experts, `answers` or `prompt`."""
    return [name for name in re.findall(r"{([A-Za-z0-9_.-]+)}", template) if name not in {*experts, ANSWERS, PROMPT}]
