"""The server's own work, with handles that do what they are told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.serve.ingress import Facts, Server
from cluster.serve.opening import ready
from cluster.serve.panel import Panel
from cluster.serve.protocol import ApiError, ChatRequest, CompletionRequest
from cluster.serve.replicas import Opening, Said
from rollout.answerer import PromptError

OPENING = Opening(3, 4, {"one": 0.5, "two": 0.5}, True, ())
WHOLE = Said(0, "yes", 2, ("y", "es"), (-0.1, -0.2), "stop")


class Stream:
    """A policy's answer: what comes in order; `hang` comes never, and errors are raised."""

    def __init__(self, items: list[Any]) -> None:
        self._items, self.cancelled = iter(items), False

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        item = next(self._items, StopAsyncIteration())
        if item == "hang":
            await asyncio.Event().wait()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Policy:
    """A handle whose answers depend on the prompt."""

    def __init__(self, answers: Callable[[str], list[Any]]) -> None:
        self._answers, self.streams = answers, list[Stream]()

    def options(self, stream: bool) -> Policy:
        return self

    @property
    def answer(self) -> Policy:
        return self

    def remote(self, messages: Any, *rest: Any) -> Stream:
        self.streams.append(Stream(self._answers(messages[-1]["content"])))
        return self.streams[-1]


class Request:
    """A request's body."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def stream(self) -> Any:
        yield self._body


@pytest.fixture
def serving(bundle: Path) -> Callable[[Callable[[str], list[Any]], float], Server]:
    opened = ready(bundle)

    def server(answers: Callable[[str], list[Any]], deadline_s: float = 30.0) -> Server:
        return Server(Facts("m", opened, "nothing", 1, 1.0, deadline_s, 0), Policy(answers), Panel({}, 1.0))

    return server


def asked(server: Server, kind: type, **body: Any) -> Any:
    request: Any = Request(json.dumps({"model": "m", **body}).encode())
    return asyncio.run(server.respond(request, kind))


def events(server: Server, **body: Any) -> list[Any]:
    """Of a stream, read to its end."""

    async def read() -> list[str]:
        request: Any = Request(json.dumps({"model": "m", "stream": True, **body}).encode())
        response = await server.respond(request, CompletionRequest)
        return [event async for event in response.body_iterator]

    return [json.loads(text) if (text := event.removeprefix("data: ").strip()) != "[DONE]" else text
            for event in asyncio.run(read())]  # fmt: skip


def test_one_prompt_that_is_refused_ends_the_others(serving) -> None:
    def answers(prompt: str) -> list[Any]:
        return [RayTaskError("answer", "", PromptError("it is empty"))] if "bad" in prompt else [OPENING, "hang"]

    server = serving(answers)
    with pytest.raises(ApiError, match="it is empty") as refused:
        asked(server, CompletionRequest, prompt=["good", "bad"])
    assert refused.value.status == 400 and refused.value.param == "messages"
    assert server.policy.streams[0].cancelled


@pytest.mark.parametrize("items", [["hang"], [OPENING, "hang"]])
def test_the_deadline_is_that_of_the_whole_request(serving, items) -> None:
    server = serving(lambda prompt: items, 0.05)
    with pytest.raises(ApiError, match=r"no answer within 0\.05 s") as late:
        asked(server, CompletionRequest, prompt="a")
    assert late.value.status == 504 and server.policy.streams[0].cancelled


def test_a_stream_that_is_late_or_whose_policy_dies_ends_with_an_error(serving) -> None:
    server = serving(lambda prompt: [OPENING, "hang"], 0.05)
    (late,) = events(server, prompt="a")
    assert late["error"]["code"] == "timeout" and server.policy.streams[0].cancelled
    half = Said(0, "y", 1, ("y",), (-0.1,), None)
    first, gone = events(serving(lambda prompt: [OPENING, half, ActorDiedError()]), prompt="a")
    assert first["choices"][0]["text"] == "y" and gone["error"]["code"] == "unavailable"
    *_, failed = events(serving(lambda prompt: [OPENING, RayTaskError("answer", "", KeyError("x"))]), prompt="a")
    assert failed["error"]["code"] == "internal_error"


def test_whoever_stops_reading_a_stream_ends_it_also_before_its_first_event(serving) -> None:
    server = serving(lambda prompt: [OPENING, "hang"])

    async def leave() -> None:
        request: Any = Request(json.dumps({"model": "m", "stream": True, "prompt": ["a", "b"]}).encode())
        response = await server.respond(request, CompletionRequest)

        async def gone(*_: Any) -> Any:
            raise OSError("the client has left")

        with pytest.raises(BaseException):  # noqa: B017 - whatever the web framework makes of it
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, gone, gone)

    asyncio.run(leave())
    assert [stream.cancelled for stream in server.policy.streams] == [True, True]


def test_a_policy_that_dies_before_its_first_word_is_asked_again(serving) -> None:
    attempts = iter([[ActorDiedError()], [OPENING, WHOLE]])
    body = json.loads(asked(serving(lambda prompt: next(attempts)), CompletionRequest, prompt="a").body)
    assert body["choices"][0]["text"] == "yes"
    with pytest.raises(ApiError, match="the policy is not there"):
        asked(serving(lambda prompt: [ActorDiedError()]), CompletionRequest, prompt="a")


def test_samples_come_in_order_with_what_they_cost(serving) -> None:
    second = Said(1, "no", 1, ("no",), (-0.5,), "length")
    turns = [{"role": "user", "content": "a"}]
    server = serving(lambda prompt: [OPENING, second, WHOLE])
    body = json.loads(asked(server, ChatRequest, messages=turns, n=2, logprobs=True).body)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["yes", "no"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "length"]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert body["choices"][0]["logprobs"]["content"][1]["token"] == "es"
    assert body["musketeers"]["prefix_tokens"] == 4


@pytest.mark.parametrize("body", [b"{", b"[" * 200_000, b"\xff"])
def test_a_body_that_is_no_json_is_refused(serving, body: bytes) -> None:
    request: Any = Request(body)
    with pytest.raises(ApiError, match="the body is no JSON"):
        asyncio.run(serving(lambda prompt: []).respond(request, ChatRequest))


def test_a_request_s_stop_strings_come_behind_the_run_s_own(bundle: Path) -> None:
    opened = ready(bundle, None, ["sampling.stop=['a', \"\\n\\n\"]"])
    server = Server(Facts("m", opened, "nothing", 1, 1.0, 1.0, 0), Policy(lambda text: []), Panel({}, 1.0))
    for stop, found in ((None, ("a", "\n\n")), ("b", ("a", "\n\n", "b")), (["a", "c"], ("a", "\n\n", "c"))):
        asked = CompletionRequest.model_validate({"model": "m", "prompt": "x", "stop": stop})
        assert server._decoding(asked).stop == found


def test_a_body_without_end_is_refused(serving) -> None:
    class Endless:
        async def stream(self) -> Any:
            while True:
                yield b" " * 2**20

    request: Any = Endless()
    with pytest.raises(ApiError) as refused:
        asyncio.run(serving(lambda prompt: []).respond(request, ChatRequest))
    assert refused.value.status == 413
