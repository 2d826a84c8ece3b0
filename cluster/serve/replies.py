"""What a client hears: a response's choices, and a stream's chunks."""

from __future__ import annotations

import json
import time
from typing import Any

from cluster.serve import protocol
from cluster.serve.protocol import ChatRequest, CompletionRequest
from cluster.serve.replicas import Said


class Chunks:
    """A stream's chunks, which share their id and time."""

    def __init__(self, asked: ChatRequest | CompletionRequest, model: str) -> None:
        chat = isinstance(asked, ChatRequest)
        self._asked = asked
        self._head = (chat, True, model, protocol.new_id(chat), int(time.time()))

    def event(self, choices: list[Any], **more: Any) -> str:
        """One, as it is sent."""
        chunk = protocol.envelope(*self._head, choices)
        usage = {"usage": None} if self._asked.with_usage else {}
        return f"data: {json.dumps(chunk | usage | more)}\n\n"


def whole(asked: ChatRequest | CompletionRequest, index: int, said: Said) -> dict[str, Any]:
    """One of a response's choices."""
    if isinstance(asked, ChatRequest):
        message = {"role": "assistant", "content": said.text, "refusal": None}
        return choice(index, message=message, logprobs=_logprobs(asked, said), finish_reason=said.finish)
    return choice(index, text=said.text, logprobs=_logprobs(asked, said), finish_reason=said.finish)


def piece(asked: ChatRequest | CompletionRequest, index: int, said: Said) -> dict[str, Any]:
    """One of a chunk's choices."""
    if isinstance(asked, ChatRequest):
        delta = {"content": said.text} if said.text or said.finish is None else {}
        return choice(index, delta=delta, logprobs=_logprobs(asked, said), finish_reason=said.finish)
    return choice(index, text=said.text, logprobs=_logprobs(asked, said), finish_reason=said.finish)


def choice(index: int, **parts: Any) -> dict[str, Any]:
    """A choice of which so much is known."""
    return {"index": index, "logprobs": None, "finish_reason": None, **parts}


def _logprobs(asked: ChatRequest | CompletionRequest, said: Said) -> dict[str, Any] | None:
    if isinstance(asked, ChatRequest):
        return protocol.logprobs_of(True, said.words, said.logprobs) if asked.logprobs else None
    return protocol.logprobs_of(False, said.words, said.logprobs) if asked.logprobs is not None else None
