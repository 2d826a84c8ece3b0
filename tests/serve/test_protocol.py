"""Requests as clients send them, and the refusals they get."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ConfigError
from cluster.serve.keys import KeyMiddleware, api_key, digest
from cluster.serve.protocol import ApiError, ChatRequest, CompletionRequest, parsed
from rollout.detokenizer import Stops

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def test_a_conversation_in_parts_and_roles_of_openais() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "me"}]
    asked = parsed(ChatRequest, CHAT | {"messages": turns, "stop": "x", "max_completion_tokens": 3, "max_tokens": 9})
    (messages,) = asked.conversations()  # type: ignore[union-attr]
    assert messages == ({"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"})
    assert asked.stop == ("x",) and asked.limit == 3


def test_what_asks_for_nothing_is_let_pass() -> None:
    extras = {"user": "u", "presence_penalty": 0, "tools": [], "logit_bias": None, "temperature": None, "n": None}
    asked = parsed(ChatRequest, CHAT | extras | {"response_format": {"type": "text"}})
    assert asked.n == 1 and asked.temperature is None
    assert parsed(CompletionRequest, TEXT | {"echo": False, "best_of": 1}).prompt == ["hi"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "change", "said", "param"),
    [
        (ChatRequest, {"tools": [{}]}, "tools is not supported here", None),
        (ChatRequest, {"presence_penalty": 0.5}, "presence_penalty is not supported", None),
        (ChatRequest, {"top_logprobs": 3}, "top_logprobs is not supported", None),
        (ChatRequest, {"temperature": 3}, "temperature", "temperature"),
        (ChatRequest, {"messages": []}, "messages", "messages"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "only parts of type text",
            None,
        ),
        (ChatRequest, {"colour": "red"}, "colour: there is no such field here", "colour"),
        (ChatRequest, {"stream_options": {"include_usage": True}}, "stream_options is for stream: true", None),
        (ChatRequest, {"n": 0}, "n: ", "n"),
        (ChatRequest, {"stop": [""]}, "must not be empty", "stop"),
        (ChatRequest, {"model": None}, "model: Field required", "model"),
        (CompletionRequest, {"prompt": [[1, 2]]}, "prompts must be texts", "prompt"),
        (CompletionRequest, {"echo": True}, "echo is not supported", None),
        (CompletionRequest, {"prompt": ["a"] * 200, "n": 100}, "200 prompts with n = 100 are more than 512", None),
        (ChatRequest, {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool calls", None),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(kind, change, said, param) -> None:
    with pytest.raises(ApiError) as raised:
        parsed(kind, (CHAT if kind is ChatRequest else TEXT) | change)
    error = raised.value.body()["error"]
    assert raised.value.status == 400 and said in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_a_key_is_needed_where_others_can_reach(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MUSKETEERS_API_KEY", raising=False)
    assert api_key(None, "127.0.0.1") is None
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 is seen by other machines"):
        api_key(None, "0.0.0.0")
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match="cannot be read"):
        api_key(file, "127.0.0.1")
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        api_key(file, "127.0.0.1")
    file.write_text("secret\n")
    assert api_key(file, "0.0.0.0") == "secret"
    monkeypatch.setenv("MUSKETEERS_API_KEY", "other")
    assert api_key(None, "0.0.0.0") == "other"
    monkeypatch.setenv("MUSKETEERS_API_KEY", " ")
    with pytest.raises(ConfigError, match="is seen by other machines"):
        api_key(None, "0.0.0.0")


@pytest.mark.parametrize(
    ("path", "header", "through"),
    [
        ("/v1/models", None, False),
        ("/v1/models", "Bearer secret", True),
        ("/v1/models", "bearer secret", True),
        ("/v1/models", "Bearer secret2", False),
        ("/v1/models", "Basic secret", False),
        ("/v1/models", "Bearer ", False),
        ("/-/routes", None, False),
        ("/nowhere", None, False),
        ("/health", None, True),
        ("/health/x", None, False),
    ],
)
def test_every_route_but_health_wants_the_key(path: str, header: str | None, through: bool) -> None:
    reached, sent = [], []

    async def inner(scope, receive, send) -> None:
        reached.append(scope["path"])

    async def send(message) -> None:
        sent.append(message)

    headers = [] if header is None else [(b"authorization", header.encode())]
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(KeyMiddleware(inner, digest("secret"))(scope, None, send))
    assert bool(reached) == through and (through or sent[0]["status"] == 401)
    asyncio.run(KeyMiddleware(inner, digest(None))({"type": "http", "path": path, "headers": []}, None, send))
    assert reached[-1] == path


@given(
    text=st.text(alphabet="abc", max_size=20),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 20), max_size=6),
)
def test_a_stop_is_met_wherever_the_pieces_are_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    cutter, shown, met = Stops(stops), "", False
    for index, piece in enumerate(pieces):
        said, met = cutter.add(piece, last=index == len(pieces) - 1)
        shown += said
        if met:
            break
    ends = [text.find(stop) for stop in stops if stop in text]
    # What is met first as the text comes; a longer stop that begins earlier may still be incomplete then.
    assert met == bool(ends)
    if not met:
        assert shown == text
    else:
        assert text.startswith(shown) and any(text[len(shown) :].startswith(stop) for stop in stops)
        assert not any(stop in shown for stop in stops)
