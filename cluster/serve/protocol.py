"""OpenAI's requests, responses and errors, as far as they are served.

What is not is refused by name, never ignored: a client that asks for penalties must not believe that it got them.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rollout.types import Message

MOST_SAMPLES = 128
MOST_ANSWERS = 512  # of one request
# Fields of OpenAI's that mean nothing here, and change no answer.
HARMLESS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity",
)  # fmt: skip
# Served only with a value that asks for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "top_logprobs": (None, 0),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None,),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}


class ApiError(Exception):
    """What a client did wrong, or what went wrong, as it is answered."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False  # there is none either way


class _Asked(BaseModel):
    """What both kinds of request share.

    temperature, top_p, max_tokens: None takes the run's own.  stop: in addition to the run's own.
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MOST_SAMPLES)
    seed: int | None = None
    stop: tuple[str, ...] = Field((), max_length=16)
    stream: bool = False
    stream_options: _StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for key, neutral in NEUTRAL.items():
            if key in values and key not in cls.model_fields and values[key] not in neutral:
                raise ValueError(f"{key} is not supported here")
        kept = {key: value for key, value in values.items() if key not in HARMLESS and key not in NEUTRAL}
        # Of a field that is null, the default.
        return {key: value for key, value in kept.items() if value is not None}

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("a stop text must not be empty")
        return stop

    @model_validator(mode="after")
    def _only_with_streams(self) -> _Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @field_validator("seed")
    @classmethod
    def _of_62_bits(cls, seed: int | None) -> int | None:
        return None if seed is None else seed % 2**62

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with what it used."""
        return self.stream_options is not None and self.stream_options.include_usage


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    tool_calls: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _texts_only(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError("only parts of type text are read here")
        return content

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _no_tools(cls, calls: Any) -> None:
        if calls:
            raise ValueError("tool calls are not read here")

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatRequest(_Asked):
    """`/v1/chat/completions`.  logprobs: of the sampled tokens."""

    messages: list[_Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False

    def conversations(self) -> list[tuple[Message, ...]]:
        """One."""
        return [tuple(turn.message() for turn in self.messages)]

    @property
    def limit(self) -> int | None:
        """Tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Asked):
    """`/v1/completions`.  prompt: one, or several, each of which gets `n` answers."""

    prompt: list[str] = Field(min_length=1, max_length=256)
    logprobs: Literal[0] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and any(not isinstance(each, str) for each in prompt):
            raise ValueError("prompts must be texts: experts and policy have different tokens")
        return [prompt] if isinstance(prompt, str) else prompt

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompt) * self.n > MOST_ANSWERS:
            raise ValueError(f"{len(self.prompt)} prompts with n = {self.n} are more than {MOST_ANSWERS} answers")
        return self

    @property
    def limit(self) -> int | None:
        """Tokens of an answer."""
        return self.max_tokens


def parsed(kind: type[ChatRequest] | type[CompletionRequest], body: Any) -> ChatRequest | CompletionRequest:
    """A request from its JSON.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "there is no such field here"
        raise ApiError(400, f"{where}: {message}" if where else message, param=where) from None


def new_id(chat: bool) -> str:
    """Of a response."""
    return f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens; a prompt's are the policy's own, without the prefix."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def envelope(
    chat: bool, chunk: bool, model: str, identity: str, created: int, choices: Sequence[Any]
) -> dict[str, Any]:
    """A response, or a chunk of one.  created: in seconds since 1970."""
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
    return {"id": identity, "object": kind, "created": created, "model": model, "choices": list(choices)}


def logprobs_of(chat: bool, tokens: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """Of sampled tokens, by their texts."""
    if not chat:
        starts = list(itertools.accumulate(map(len, tokens), initial=0))[:-1]
        return {"tokens": list(tokens), "token_logprobs": list(values), "top_logprobs": None, "text_offset": starts}
    return {
        "content": [
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
            for token, value in zip(tokens, values, strict=True)
        ],
        "refusal": None,
    }
