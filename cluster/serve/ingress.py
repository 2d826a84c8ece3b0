"""The OpenAI-compatible face of a trained router: requests in, experts asked, the policy's answer out."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from cluster.serve import protocol
from cluster.serve.keys import KeyMiddleware
from cluster.serve.measures import Measures
from cluster.serve.opening import Ready
from cluster.serve.panel import Panel, Seen
from cluster.serve.protocol import ApiError, ChatRequest, CompletionRequest
from cluster.serve.replicas import Opening, Said
from experts.router import Asks
from rollout.answerer import PromptTooLongError
from rollout.continuous import Decoding
from rollout.types import Message

ATTEMPTS = 3  # of the policy, while nothing of its answer has been heard
HEALTH_S = 5.0
LOST = (RayError, DeploymentUnavailableError, BackPressureError)


@dataclass(frozen=True)
class Facts:
    """What the ingress knows of what it serves.

    name: of the model, for clients.
    answer_tokens: of an expert's answer, where the router asks for answers.
    deadline_s: of a whole request.
    """

    name: str
    ready: Ready
    asks: Asks
    answer_tokens: int
    expert_timeout_s: float
    deadline_s: float
    created: int


@dataclass
class _Answering:
    """One conversation's answer under way: the opening has come."""

    opening: Opening
    seen: Seen
    pieces: AsyncGenerator[Said]


def ingress(key_digest: str) -> Any:
    """The deployment; bind it to `Facts`, the policy's handle and the experts' by name."""
    app = FastAPI(title="n-Musketeers", openapi_url=None)
    app.add_middleware(KeyMiddleware, digest=key_digest)

    @app.exception_handler(ApiError)
    async def _told(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def _unknown(request: Request, error: HTTPException) -> JSONResponse:
        told = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(told.body(), error.status_code)

    @serve.deployment(name="openai", max_ongoing_requests=1024)
    @serve.ingress(app)
    class OpenAI:
        """Routes."""

        def __init__(self, facts: Facts, policy: Any, experts: dict[str, Any]) -> None:
            self.server = Server(facts, policy, Panel(experts, facts.expert_timeout_s))

        @app.get("/health")
        async def health(self) -> JSONResponse:
            body = await self.server.health()
            return JSONResponse(body, 200 if body["status"] == "ok" else 503)

        @app.get("/v1/models")
        async def models(self) -> dict[str, Any]:
            return {"object": "list", "data": [self.server.model()]}

        @app.get("/v1/models/{name:path}")
        async def model(self, name: str) -> dict[str, Any]:
            self.server.check_model(name)
            return self.server.model()

        @app.post("/v1/chat/completions")
        async def chat(self, request: Request) -> Any:
            return await self.server.respond(request, ChatRequest)

        @app.post("/v1/completions")
        async def completions(self, request: Request) -> Any:
            return await self.server.respond(request, CompletionRequest)

    return OpenAI


class Server:
    """What the routes do."""

    def __init__(self, facts: Facts, policy: Any, panel: Panel) -> None:
        self.facts, self.policy, self.panel = facts, policy, panel
        self.measures = Measures(facts.name)

    async def health(self) -> dict[str, Any]:
        """Whether the policy answers, and which experts do."""
        try:
            async with asyncio.timeout(HEALTH_S):
                under_way, sampled = await self.policy.load.remote()
        except (*LOST, TimeoutError):
            return {"status": "the policy does not answer", "experts": self.panel.states}
        return {"status": "ok", "experts": self.panel.states, "under_way": under_way, "sampled_tokens": sampled}

    def model(self) -> dict[str, Any]:
        """The one there is, for `/v1/models`."""
        trained = self.facts.ready.trained
        return {
            "id": self.facts.name,
            "object": "model",
            "created": self.facts.created,
            "owned_by": "n-musketeers",
            "musketeers": {"run": trained.name, "step": trained.step, "experts": list(self.facts.ready.shape.experts)},
        }

    def check_model(self, name: str) -> None:
        """Refuses another model than the one there is."""
        if name != self.facts.name:
            raise ApiError(
                404, f"the model {name!r} does not exist; there is {self.facts.name!r}", "model_not_found", "model"
            )

    async def respond(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Any:
        """A request's whole response, or its stream."""
        start = time.perf_counter()
        try:
            body = await request.json()
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None
        asked = protocol.parsed(kind, body)
        self.check_model(asked.model)
        decoding = self._decoding(asked)
        answering = await self._opened(self._conversations(asked), decoding, asked)
        if asked.stream:
            events = self._events(asked, answering, start)
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        try:
            async with asyncio.timeout(self.facts.deadline_s):
                body = await self._whole(asked, answering)
        except TimeoutError:
            self.measures.ended("timeout", time.perf_counter() - start)
            raise ApiError(504, f"no answer within {self.facts.deadline_s:g} s", "timeout") from None
        finally:
            await _close(answering)
        self.measures.ended("ok", time.perf_counter() - start)
        return JSONResponse(body)

    def _conversations(self, asked: ChatRequest | CompletionRequest) -> list[tuple[Message, ...]]:
        if isinstance(asked, ChatRequest):
            return [self.facts.ready.with_system(messages) for messages in asked.conversations()]
        return [self.facts.ready.messages(prompt) for prompt in asked.prompt]

    def _decoding(self, asked: ChatRequest | CompletionRequest) -> Decoding:
        sampling = self.facts.ready.config.sampling
        return Decoding(
            temperature=sampling.temperature if asked.temperature is None else asked.temperature,
            top_p=asked.top_p or 1.0,
            max_new_tokens=asked.limit or sampling.max_new_tokens,
            samples=asked.n,
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        )

    async def _opened(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding,
        asked: ChatRequest | CompletionRequest,
    ) -> list[_Answering]:
        """Every conversation's answer, opened at once; where one cannot be, the others end."""
        found = await asyncio.gather(
            *(self._open(messages, decoding, asked) for messages in conversations), return_exceptions=True
        )
        answering = [each for each in found if isinstance(each, _Answering)]
        for error in found:
            if isinstance(error, BaseException):
                await _close(answering)
                raise error
        return answering

    async def _open(
        self, messages: Sequence[Message], decoding: Decoding, asked: ChatRequest | CompletionRequest
    ) -> _Answering:
        """Asks the experts, then the policy, until its opening comes.

        Raises:
            ApiError: when the prompt is too long, or the policy is not there.
        """
        start = time.perf_counter()
        seen = await self._ask(messages)
        self.measures.asked(seen, time.perf_counter() - start)
        for attempt in range(ATTEMPTS):
            answer = self.policy.options(stream=True).answer.remote(
                messages, seen.encoded, decoding, asked.stop, not asked.stream
            )
            try:
                opening = await anext(answer)
                return _Answering(opening, seen, _until_left(answer))
            except RayTaskError as error:
                raise _refused(error) from None
            except LOST:
                await asyncio.sleep(0.1 * 2**attempt)
            except BaseException:
                answer.cancel()
                raise
        self.measures.ended("unavailable", time.perf_counter() - start)
        raise ApiError(503, "the policy is not there: try again in a moment", "unavailable")

    async def _ask(self, messages: Sequence[Message]) -> Seen:
        if self.facts.asks == "states":
            return await self.panel.ask("encode", messages)
        if self.facts.asks == "answers":
            return await self.panel.ask("answer", messages, self.facts.answer_tokens)
        return Seen((), {})

    async def _whole(self, asked: ChatRequest | CompletionRequest, answering: Sequence[_Answering]) -> dict[str, Any]:
        chat = isinstance(asked, ChatRequest)
        choices, tokens = [], 0
        for at, each in enumerate(answering):
            mine: dict[int, Said] = {}
            async for said in each.pieces:
                mine[said.sample] = said
            if len(mine) != asked.n:
                raise ApiError(503, "the policy went away in the middle of its answer: ask again", "unavailable")
            for sample in range(asked.n):
                choices.append(_choice(asked, at * asked.n + sample, mine[sample]))
                tokens += mine[sample].tokens
        body = protocol.envelope(chat, False, self.facts.name, protocol.new_id(chat), choices)
        prompt = sum(each.opening.prompt_tokens for each in answering)
        self.measures.used(prompt, tokens)
        return body | {"usage": protocol.usage(prompt, tokens), "musketeers": self._extension(answering)}

    async def _events(
        self, asked: ChatRequest | CompletionRequest, answering: Sequence[_Answering], start: float
    ) -> AsyncIterator[str]:
        """Server-sent events; the last chunk of each choice says why it ended, and what the router looked at."""
        chat, identity = isinstance(asked, ChatRequest), protocol.new_id(isinstance(asked, ChatRequest))
        outcome, tokens = "left", 0

        def event(choices: list[Any], **more: Any) -> str:
            chunk = protocol.envelope(chat, True, self.facts.name, identity, choices)
            if asked.with_usage:
                chunk["usage"] = None
            return f"data: {json.dumps(chunk | more)}\n\n"

        try:
            for at, each in enumerate(answering):
                if chat:
                    for sample in range(asked.n):
                        delta = {"role": "assistant", "content": ""}
                        yield event([_delta(sample, delta=delta)])
                over = 0
                async for said in each.pieces:
                    if not tokens:
                        self.measures.first(time.perf_counter() - start)
                    tokens, over = tokens + said.tokens, over + (said.finish is not None)
                    choice = _piece(asked, at * asked.n + said.sample, said)
                    extension = {} if said.finish is None else {"musketeers": self._extension([each])}
                    yield event([choice], **extension)
                if over != asked.n:
                    raise ApiError(503, "the policy went away in the middle of its answer: ask again", "unavailable")
            prompt = sum(each.opening.prompt_tokens for each in answering)
            self.measures.used(prompt, tokens)
            if asked.with_usage:
                yield event([], usage=protocol.usage(prompt, tokens))
            outcome = "ok"
            yield "data: [DONE]\n\n"
        except ApiError as error:
            outcome = "unavailable"
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            self.measures.ended(outcome, time.perf_counter() - start)
            await _close(answering)

    def _extension(self, answering: Sequence[_Answering]) -> Any:
        """What only this server says: attention by expert, whether the prefix was used, experts that were missing."""
        said = [
            {
                "attention": each.opening.attention,
                "prefix": each.opening.gate,
                "prefix_tokens": each.opening.slots,
                "masked": dict(each.seen.missing),
            }
            for each in answering
        ]
        return said[0] if len(said) == 1 else said


async def _close(answering: Sequence[_Answering]) -> None:
    """Ends what is still under way of these."""
    for each in answering:
        await each.pieces.aclose()


async def _until_left(answer: Any) -> AsyncGenerator[Said]:
    """A policy's pieces; whoever stops listening cancels the request, down to the engine."""
    try:
        async for said in answer:
            yield said
    except LOST:
        return  # what is missing of the answer tells
    finally:
        answer.cancel()


def _refused(error: RayTaskError) -> ApiError:
    cause = error.cause
    if isinstance(cause, PromptTooLongError):
        return ApiError(400, str(cause), "context_length_exceeded", "messages")
    return ApiError(500, f"the policy failed: {type(cause).__name__}: {cause}", "internal_error")


def _choice(asked: ChatRequest | CompletionRequest, index: int, said: Said) -> dict[str, Any]:
    """One of a whole response."""
    if isinstance(asked, ChatRequest):
        logprobs = protocol.logprobs_of(True, said.words, said.logprobs) if asked.logprobs else None
        message = {"role": "assistant", "content": said.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": said.finish}
    logprobs = protocol.logprobs_of(False, said.words, said.logprobs) if asked.logprobs is not None else None
    return {"index": index, "text": said.text, "logprobs": logprobs, "finish_reason": said.finish}


def _piece(asked: ChatRequest | CompletionRequest, index: int, said: Said) -> dict[str, Any]:
    """One of a chunk."""
    if isinstance(asked, ChatRequest):
        logprobs = protocol.logprobs_of(True, said.words, said.logprobs) if asked.logprobs else None
        delta = {"content": said.text} if said.text or said.finish is None else {}
        return _delta(index, delta=delta, logprobs=logprobs, finish_reason=said.finish)
    logprobs = protocol.logprobs_of(False, said.words, said.logprobs) if asked.logprobs is not None else None
    return _delta(index, text=said.text, logprobs=logprobs, finish_reason=said.finish)


def _delta(index: int, **parts: Any) -> dict[str, Any]:
    return {"index": index, "logprobs": None, "finish_reason": None, **parts}
