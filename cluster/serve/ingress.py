"""The OpenAI-compatible face of a trained router: requests in, experts asked, the policy's answer out."""

from __future__ import annotations

import asyncio
import json
import math
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
from cluster.serve.replies import Chunks, choice, piece, whole
from experts.router import Asks
from rollout.answerer import PromptError, PromptTooLongError
from rollout.continuous import Decoding
from rollout.types import Message

ATTEMPTS = 3  # of the policy, while nothing of its answer has been heard
HEALTH_S = 5.0
BUSY_S = 60.0  # since the policy has begun an answer
BODY_BYTES = 8 * 2**20
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
    """One conversation's answer under way: the opening has come.  stream: of the policy."""

    opening: Opening
    seen: Seen
    stream: Any

    async def pieces(self) -> AsyncIterator[Said]:
        """What is said.

        Raises:
            ApiError: when the policy fails, or goes away.
        """
        try:
            async for said in self.stream:
                yield said
        except RayTaskError as error:
            raise _refused(error) from None
        except LOST:
            raise ApiError(503, "the policy went away in the middle of its answer: ask again", "unavailable") from None

    def close(self) -> None:
        """Ends the request, down to the engine; it may be over."""
        self.stream.cancel()


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
        self._opened_at = -math.inf

    async def health(self) -> dict[str, Any]:
        """Whether the policy answers, and which experts do."""
        try:
            async with asyncio.timeout(HEALTH_S):
                under_way, sampled = await self.policy.load.remote()
        except (*LOST, TimeoutError) as error:
            # A policy with all its hands full answers us late; what it has just begun to answer others shows it.
            if isinstance(error, TimeoutError) and time.monotonic() - self._opened_at < BUSY_S:
                return {"status": "ok", "experts": self.panel.states, "busy": True}
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
        deadline = asyncio.get_running_loop().time() + self.facts.deadline_s
        outcome = "left"
        try:
            asked = protocol.parsed(kind, await _json(request))
            self.check_model(asked.model)
            async with asyncio.timeout_at(deadline):
                answering = await self._opened(self._conversations(asked), self._decoding(asked), asked)
                if asked.stream:
                    outcome = ""  # the stream's own
                    events = self._events(asked, answering, start, deadline)
                    return _Stream(events, answering)
                try:
                    body = await self._whole(asked, answering)
                finally:
                    _close(answering)
            outcome = "ok"
            return JSONResponse(body)
        except TimeoutError:
            outcome = "timeout"
            raise self._late() from None
        except ApiError as error:
            outcome = "refused" if error.status < 500 else "failed"
            raise
        finally:
            if outcome:
                self.measures.ended(outcome, time.perf_counter() - start)

    def _late(self) -> ApiError:
        return ApiError(504, f"no answer within {self.facts.deadline_s:g} s", "timeout")

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
            stop=tuple(dict.fromkeys((*sampling.stop, *asked.stop))),
        )

    async def _opened(
        self,
        conversations: Sequence[Sequence[Message]],
        decoding: Decoding,
        asked: ChatRequest | CompletionRequest,
    ) -> list[_Answering]:
        """Every conversation's answer, opened at once; where one cannot be, or the client leaves, the others end."""
        opening = [asyncio.ensure_future(self._open(messages, decoding, asked)) for messages in conversations]
        try:
            return list(await asyncio.gather(*opening))
        except BaseException:
            for each in opening:
                each.cancel()
            found = await asyncio.gather(*opening, return_exceptions=True)
            _close([each for each in found if isinstance(each, _Answering)])
            raise

    async def _open(
        self, messages: Sequence[Message], decoding: Decoding, asked: ChatRequest | CompletionRequest
    ) -> _Answering:
        """Asks the experts, then the policy, until its opening comes.

        Raises:
            ApiError: when the policy cannot read the prompt, or is not there.
        """
        start = time.perf_counter()
        seen = await self._ask(messages)
        self.measures.asked(seen, time.perf_counter() - start)
        for attempt in range(ATTEMPTS):
            stream = self.policy.options(stream=True).answer.remote(messages, seen.encoded, decoding, not asked.stream)
            try:
                opening = await anext(stream)
                self._opened_at = time.monotonic()
                return _Answering(opening, seen, stream)
            except RayTaskError as error:
                raise _refused(error) from None
            except BackPressureError:
                raise ApiError(503, "too many requests wait already: try again in a moment", "overloaded") from None
            except LOST:
                await asyncio.sleep(0.1 * 2**attempt)
            except BaseException:
                stream.cancel()
                raise
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
            async for said in each.pieces():
                choices.append(whole(asked, at * asked.n + said.sample, said))
                tokens += said.tokens
        choices.sort(key=lambda each: each["index"])
        body = protocol.envelope(chat, False, self.facts.name, protocol.new_id(chat), int(time.time()), choices)
        prompt = sum(each.opening.prompt_tokens for each in answering)
        self.measures.used(prompt, tokens)
        return body | {"usage": protocol.usage(prompt, tokens), "musketeers": self._extension(answering)}

    async def _events(
        self,
        asked: ChatRequest | CompletionRequest,
        answering: Sequence[_Answering],
        start: float,
        deadline: float,
    ) -> AsyncGenerator[str]:
        """Server-sent events; the last chunk of each choice says why it ended, and what the router looked at."""
        chat, outcome = isinstance(asked, ChatRequest), "left"
        chunks = Chunks(asked, self.facts.name)
        prompt, tokens = sum(each.opening.prompt_tokens for each in answering), 0
        try:
            if chat:
                for sample in range(asked.n):
                    yield chunks.event([choice(sample, delta={"role": "assistant", "content": ""})])
            for at, each in enumerate(answering):
                pieces = each.pieces()
                while True:
                    async with asyncio.timeout_at(deadline):
                        said = await anext(pieces, None)
                    if said is None:
                        break
                    if not tokens:
                        self.measures.first(time.perf_counter() - start)
                    tokens += said.tokens
                    extension = {} if said.finish is None else {"musketeers": self._extension([each])}
                    yield chunks.event([piece(asked, at * asked.n + said.sample, said)], **extension)
            self.measures.used(prompt, tokens)
            if asked.with_usage:
                yield chunks.event([], usage=protocol.usage(prompt, tokens))
            outcome = "ok"
            yield "data: [DONE]\n\n"
        except TimeoutError:
            outcome = "timeout"
            yield f"data: {json.dumps(self._late().body())}\n\n"
        except ApiError as error:
            outcome = "failed"
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            _close(answering)
            self.measures.ended(outcome, time.perf_counter() - start)

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


class _Stream(StreamingResponse):
    """Server-sent events; however the response ends, also before its first byte, the answers end with it."""

    def __init__(self, events: AsyncGenerator[str], answering: Sequence[_Answering]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._events, self._answering = events, answering

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """An ASGI call."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            _close(self._answering)
            await self._events.aclose()


def _close(answering: Sequence[_Answering]) -> None:
    """Ends what is still under way of these."""
    for each in answering:
        each.close()


async def _json(request: Request) -> Any:
    """A request's body.

    Raises:
        ApiError: when it is none, or too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            raise ApiError(413, f"the body has more than {BODY_BYTES // 2**20} MiB")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None


def _refused(error: RayTaskError) -> ApiError:
    cause = error.cause
    if isinstance(cause, PromptError):
        code = "context_length_exceeded" if isinstance(cause, PromptTooLongError) else None
        return ApiError(400, str(cause), code, "messages")
    return ApiError(500, f"the policy failed: {type(cause).__name__}: {cause}", "internal_error")
