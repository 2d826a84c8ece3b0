"""Continuous batching on transformers: sequences that come and go share every forward pass.

For answering people's requests, whose lengths and times nobody knows before; training, whose prompts come together,
uses `TransformersEngine.generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from experts.kv_cache import append_rows, drop_columns, new_cache, select_rows
from experts.loading import FrozenModel
from experts.stops import StopStrings
from rollout.draws import draw_tokens
from rollout.sequence import PrefixPosition, Tokens, lay_out_prompts, next_positions, with_prefix
from rollout.types import FinishReason

COLDEST = 1e-5  # a temperature below it is 0
SMALLEST_MASS = 1e-6  # of top_p: the most likely token always counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How one request is answered.

    temperature: 0 takes the most likely token.  top_p: samples among the most likely tokens of this mass.
    seed: the same one gives the same samples, whatever else is in the batch (with vLLM: nearly always).
    stop: texts; a sample ends with the token that completes the first of them.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What was added to one of a request's samples.

    tokens, logprobs: as in `Completion`; finish: on the sample's last piece.
    """

    sample: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason | None = None


@dataclass(eq=False)
class _Request:
    tokens: Tokens
    prefix: Float[Tensor, "slots width"] | None
    decoding: Decoding
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | BaseException] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def say(self, piece: Piece | BaseException) -> None:
        # A loop that is closed has nobody left to listen.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


@dataclass(eq=False)
class _Row:
    """One sample under way."""

    request: _Request
    sample: int
    draws: np.random.Generator
    left: int
    stops: StopStrings
    said: list[int] = field(default_factory=list)

    def completes(self, token: int) -> bool:
        """Whether the sample's text ends with this token."""
        if not self.stops:
            return False
        self.said.append(token)
        return self.stops.end(self.said)


class ContinuousBatch:
    """Decodes one token a step for all sequences under way, in a thread of its own.

    Every sequence ends in the batch's last column; what stands before a shorter one is masked.

    limit: sequences at once; further requests wait.
    """

    def __init__(self, policy: FrozenModel, position: PrefixPosition, limit: int = 64) -> None:
        self.policy, self.limit = policy, limit
        self._position: PrefixPosition = position
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self.sampled = 0  # tokens so far
        self._rows: list[_Row] = []
        self._cache: Any = None
        self._mask: Tensor = torch.zeros(0, 0, dtype=torch.long)
        self._logits: Tensor = torch.zeros(0, 0)
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def under_way(self) -> int:
        """Sequences that are being decoded."""
        return len(self._rows)

    async def stream(
        self, tokens: Tokens, prefix: Float[Tensor, "slots width"] | None, decoding: Decoding
    ) -> AsyncIterator[Piece]:
        """The samples of one request, token by token; a caller that stops listening ends them."""
        request = _Request(tokens, prefix, decoding, asyncio.get_running_loop())
        with self._changed:
            if self._closing:
                raise RuntimeError("the engine is closed")
            self._waiting.append(request)
            self._changed.notify()
        going = decoding.samples
        try:
            while going:
                piece = await request.pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                going -= piece.finish is not None
                yield piece
        finally:
            request.cancelled = True

    def close(self) -> None:
        """Ends the thread; requests under way fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._rows or self._closing)
                if self._closing:
                    break
            try:
                with torch.inference_mode():
                    self._step()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is theirs who wait for an answer
                self._fail(error)
        self._fail(RuntimeError("the engine was closed"))
        while self._waiting:
            self._waiting.popleft().say(RuntimeError("the engine was closed"))

    def _fail(self, error: Exception) -> None:
        for request in {id(row.request): row.request for row in self._rows}.values():
            request.say(error)
        self._rows, self._cache = [], None

    def _step(self) -> None:
        self._keep([index for index, row in enumerate(self._rows) if not row.request.cancelled])
        self._admit()
        if not self._rows:
            return
        chosen, logprobs = choose(
            self._logits,
            [row.request.decoding.temperature for row in self._rows],
            [row.request.decoding.top_p for row in self._rows],
            [row.draws.random() for row in self._rows],
        )
        going = []
        self.sampled += len(self._rows)
        for index, (row, token, logprob) in enumerate(zip(self._rows, chosen.tolist(), logprobs.tolist(), strict=True)):
            row.left -= 1
            ended = token in self.policy.end_tokens or row.completes(token)
            finish = FinishReason.STOP if ended else FinishReason.LENGTH if row.left == 0 else None
            row.request.say(Piece(row.sample, (token,), (logprob,), finish))
            if finish is None:
                going.append(index)
        self._keep(going)
        if self._rows:
            self._forward(chosen[going])

    def _admit(self) -> None:
        """Reads the prompts of requests that wait, as many as there is room for."""
        taken: list[_Request] = []
        room = self.limit - len(self._rows)
        with self._changed:
            while self._waiting:
                needed = 0 if self._waiting[0].cancelled else self._waiting[0].decoding.samples
                if needed > room and (self._rows or taken):
                    break
                request = self._waiting.popleft()
                if not request.cancelled:
                    taken.append(request)
                    room -= needed
        # Prompts with slots and prompts without are laid out apart.
        for slots in sorted({_slots(request) for request in taken}):
            self._try([request for request in taken if _slots(request) == slots], slots)

    def _try(self, requests: Sequence[_Request], slots: int) -> None:
        """Reads prompts together, or each by itself where that fails: one's failure is not another's."""
        try:
            self._read(requests, slots)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is theirs who wait for an answer
            if len(requests) == 1:
                requests[0].say(error)
                return
            for request in requests:
                self._try([request], slots)

    def _read(self, requests: Sequence[_Request], slots: int) -> None:
        device = self.policy.device
        batch = lay_out_prompts(
            [request.tokens for request in requests], slots, self.policy.pad_id, self._position, device=device
        )
        prefixes = [request.prefix for request in requests if request.prefix is not None]
        embedded = with_prefix(
            self.policy.embed(batch.tokens), torch.stack(prefixes).to(device) if prefixes else None, batch
        )
        cache = new_cache(self.policy.model.config)
        out = self.policy.model(
            **self.policy.inputs(batch.tokens, embedded),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        copies = torch.tensor(
            [at for at, request in enumerate(requests) for _ in range(request.decoding.samples)], device=device
        )
        select_rows(cache, copies)
        mask, logits = batch.mask[copies], out.logits[copies, -1]
        new = [
            _Row(request, sample, np.random.default_rng([how.seed, sample]), how.max_new_tokens, stops)
            for request, how, stops in (
                (r, r.decoding, StopStrings(self.policy.tokenizer, r.decoding.stop)) for r in requests
            )
            for sample in range(how.samples)
        ]
        if self._rows:
            append_rows(self._cache, cache)
            length = max(mask.shape[1], self._mask.shape[1])
            mask = torch.cat([pad(one, (length - one.shape[1], 0)) for one in (self._mask, mask)])
            cache, logits = self._cache, torch.cat([self._logits, logits])
        self._cache, self._mask, self._logits = cache, mask, logits
        self._rows += new

    def _keep(self, rows: Sequence[int]) -> None:
        """Lets the other rows go, and the columns that only they had."""
        if len(rows) == len(self._rows):
            return
        self._rows = [self._rows[row] for row in rows]
        if not rows:
            self._cache = None
            return
        kept = torch.tensor(rows, device=self._mask.device)
        self._logits, self._mask = self._logits[kept], self._mask[kept]
        select_rows(self._cache, kept)
        first = int(self._mask.any(dim=0).int().argmax())
        if first:
            self._mask = self._mask[:, first:]
            drop_columns(self._cache, first)

    def _forward(self, chosen: Int[Tensor, " rows"]) -> None:
        positions = next_positions(self._mask)
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        out = self.policy.model(
            input_ids=chosen[:, None],
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        self._logits = out.logits[:, -1]


def choose(
    logits: Float[Tensor, "rows vocabulary"],
    temperatures: Sequence[float],
    top_ps: Sequence[float],
    draws: Sequence[float],
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """One token a row, and its log-probability under the distribution that it was drawn from.

    A draw in [0, 1) decides by itself, through the inverse of the cumulative distribution.
    """
    device = logits.device
    heat = torch.tensor([heat if heat >= COLDEST else 0.0 for heat in temperatures], device=device)
    logprobs = (logits.float() / torch.where(heat > 0, heat, 1.0)[:, None]).log_softmax(dim=-1)
    mass = torch.tensor(top_ps, device=device).clamp_min(SMALLEST_MASS)
    if bool((mass < 1).any()):
        ordered, order = logprobs.sort(dim=-1, descending=True)
        before = ordered.double().exp().cumsum(dim=-1) - ordered.double().exp()
        outside = torch.zeros_like(logprobs, dtype=torch.bool).scatter(1, order, before >= mass[:, None])
        logprobs = logprobs.masked_fill(outside, float("-inf")).log_softmax(dim=-1)
    uniforms = torch.tensor(draws, dtype=torch.float64, device=device)
    sampled = draw_tokens(logprobs, torch.arange(len(logprobs), device=device), uniforms)
    chosen = torch.where(heat > 0, sampled, logprobs.argmax(dim=-1))
    return chosen, logprobs.gather(1, chosen[:, None])[:, 0]


def _slots(request: _Request) -> int:
    return 0 if request.prefix is None else len(request.prefix)
