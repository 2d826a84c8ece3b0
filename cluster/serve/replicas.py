"""What Ray Serve runs: an expert that reads prompts, and the policy that answers, both behind a router that is done."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import serve

from cluster.serve.local import refuse_other
from experts.chat import PromptStyle
from experts.config import CacheConfig, ExpertConfig, RouterConfig
from experts.expert import Encoded, Expert
from experts.standins import States
from experts.state import RouterShape, RouterSnapshot
from rollout.answerer import Answerer
from rollout.config import PolicyConfig
from rollout.continuous import Decoding
from rollout.detokenizer import Detokenizer, Stops
from rollout.types import Message

BATCH_WAIT_S = 0.002
Messages = Sequence[Message]


@dataclass(frozen=True)
class Opening:
    """What a client learns of an answer beside its text.  attention: by expert; hidden: experts that were missing."""

    prompt_tokens: int
    slots: int
    attention: dict[str, float]
    gate: bool
    hidden: tuple[str, ...]


@dataclass(frozen=True)
class Said:
    """What was added to one of a request's samples.  words: the texts of `tokens`; finish: on its last piece."""

    sample: int
    text: str
    tokens: int
    words: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish: str | None


class _LivingExpert(Expert):
    def engine_died(self) -> None:
        """A replica without its engine must not keep answering: the process ends, and Serve starts another."""
        print(f"{self}: its engine is gone, the replica ends", file=sys.stderr, flush=True)
        os._exit(1)


class _LivingAnswerer(Answerer):
    def engine_died(self) -> None:
        """As an expert's."""
        print(f"{self}: its engine is gone, the replica ends", file=sys.stderr, flush=True)
        os._exit(1)


class ExpertReplica:
    """One expert; requests that come together are read together.

    size: prompts at once.
    """

    def __init__(
        self,
        config: ExpertConfig,
        path: str,
        cache: CacheConfig,
        threads: int,
        style: PromptStyle,
        fingerprint: str,
        size: int,
    ) -> None:
        self._expert = _LivingExpert(config, path, cache, threads, style)
        refuse_other(config.name, self._expert.fingerprint, fingerprint)
        self._one_at_a_time = asyncio.Lock()  # whoever has given up leaves it, and is not worked for
        self._together.set_max_batch_size(size)

    def ready(self) -> bool:
        """Answers once it is built."""
        return True

    async def encode(self, messages: Messages) -> Encoded:
        """States of a prompt; see `Expert.encode`."""
        # A template that refuses this conversation must not fail those that are read with it.
        if not self._expert.read(messages).tokens:
            raise ValueError("the prompt is empty")
        found: Encoded = await self._together(messages)
        return found

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _together(self, prompts: list[Messages]) -> list[Encoded]:
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._encode, prompts)

    async def answer(self, messages: Messages, max_new_tokens: int) -> Encoded:
        """The expert's own answer to a prompt; see `Expert.answers`."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(self._expert.answers, [messages], [0], max_new_tokens)

    def _encode(self, prompts: Sequence[Messages]) -> list[Encoded]:
        made = self._expert.encode(prompts)
        one = replace(made, hits=0, misses=0, rows=(0,), operations=0.0, cold=0.0)
        return [
            replace(one, keys=(key,), features=(feature,))
            for key, feature in zip(made.keys, made.features, strict=True)
        ]


class PolicyReplica:
    """The frozen policy behind the trained router."""

    def __init__(
        self,
        policy: PolicyConfig,
        path: str,
        router: RouterConfig,
        shape: RouterShape,
        snapshot: RouterSnapshot,
        threads: int,
        stand_ins: States,
        date: datetime.date | None,
    ) -> None:
        self._answerer = _LivingAnswerer(policy, path, router, shape, snapshot, threads, stand_ins, date)
        refuse_other("the policy", self._answerer.policy.fingerprint(), shape.policy_fingerprint)
        self._names = shape.experts

    def ready(self) -> bool:
        """Answers once it is built."""
        return True

    def load(self) -> tuple[int, int]:
        """Samples (with vLLM: requests) that the engine works on, and tokens that it has sampled so far."""
        return self._answerer.engine.under_way, self._answerer.engine.streamed

    async def answer(
        self,
        messages: Messages,
        encoded: Sequence[Encoded | None],
        decoding: Decoding,
        whole: bool,
    ) -> AsyncIterator[Opening | Said]:
        """An opening, then what is said, as it comes; see `Answerer.open`.

        whole: each sample in one piece, when it is complete.
        """
        opened = await asyncio.to_thread(self._answerer.open, messages, encoded, decoding)
        attention = dict(zip(self._names, map(float, opened.attention), strict=True))
        yield Opening(len(opened.tokens), opened.slots, attention, opened.gate, opened.hidden)
        texts = [_Text(self._answerer.policy, decoding.stop, sample) for sample in range(decoding.samples)]
        stream: Any = self._answerer.stream(opened, decoding)
        async with contextlib.aclosing(stream):
            async for piece in stream:
                text = texts[piece.sample]
                if text.over:
                    continue
                text.add(piece.tokens, piece.logprobs, None if piece.finish is None else piece.finish.value)
                if text.over or not whole:
                    yield text.take()
                if all(text.over for text in texts):
                    break


class _Text:
    """One sample as it grows: what of it has not been said yet."""

    def __init__(self, policy: Any, stops: Sequence[str], sample: int) -> None:
        self._tokenizer, self._sample = policy.tokenizer, sample
        self._characters, self._stops = Detokenizer(policy.tokenizer, policy.end_tokens), Stops(stops)
        self._finish: str | None = None
        self._clear()

    @property
    def over(self) -> bool:
        return self._finish is not None

    def add(self, tokens: tuple[int, ...], logprobs: tuple[float, ...], finish: str | None) -> None:
        text = self._characters.add(tokens, last=finish is not None)
        shown, met = self._stops.add(text, last=finish is not None)
        self._finish = "stop" if met else finish
        self._shown.append(shown)
        self._tokens += len(tokens)
        self._words += [self._tokenizer.decode([token]) for token in tokens]
        self._logprobs += logprobs

    def take(self) -> Said:
        said = Said(
            self._sample, "".join(self._shown), self._tokens, tuple(self._words), tuple(self._logprobs), self._finish
        )
        self._clear()
        return said

    def _clear(self) -> None:
        self._shown: list[str] = []
        self._words: list[str] = []
        self._logprobs: list[float] = []
        self._tokens = 0
