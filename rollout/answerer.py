"""A policy that answers people: each prompt by itself, as a stream, under one trained router."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from experts.chat import ChatError
from experts.config import RouterConfig
from experts.expert import Encoded
from experts.loading import describe
from experts.router import Asks, router_class
from experts.standins import States
from experts.state import RouterShape, RouterSnapshot
from rollout.config import PolicyConfig
from rollout.continuous import Decoding, Piece
from rollout.types import Draws, Message, Prompt
from rollout.worker import RolloutWorker


class PromptError(ValueError):
    """A prompt that the policy cannot read; the message says why."""


class PromptTooLongError(PromptError):
    """A prompt that does not fit into the policy's context together with its prefix and the answer."""


@dataclass(frozen=True)
class Opened:
    """What is known of an answer before its first token.

    tokens: of the prompt as the policy reads it, without the prefix's slots.
    attention: (experts,) share of the router's attention, the mean over heads and slots; zeros where it has none.  That
        of an expert that had nothing to say is its stand-in's.
    gate: whether the policy got the prefix.
    hidden: names of experts that had nothing to say: the router saw a stand-in, or nothing in their place.
    """

    tokens: np.ndarray
    prefix: Tensor | None
    attention: np.ndarray
    gate: bool
    hidden: tuple[str, ...]

    @property
    def slots(self) -> int:
        """Of the prefix."""
        return 0 if self.prefix is None else len(self.prefix)


class Answerer(RolloutWorker):
    """A rollout worker under one router for good."""

    def __init__(
        self,
        policy: PolicyConfig,
        path: str,
        router: RouterConfig,
        shape: RouterShape,
        snapshot: RouterSnapshot,
        threads: int = 0,
        stand_ins: States = MappingProxyType({}),
        date: datetime.date | None = None,
    ) -> None:
        super().__init__(policy, path, router, seed=0, threads=threads, date=date)
        with contextlib.ExitStack() as built:
            built.callback(self.close)
            self.attach(shape)
            self.shape, self.snapshot, self.stand_ins = shape, snapshot, dict(stand_ins)
            self._fewest = 2 if router.prefix.position == "after_bos" else 1
            self._slots = 0 if router.kind in ("none", "text") else router.latents
            self.asks: Asks = getattr(router_class(router.kind), "asks", "states")
            self.limit: int | None = policy.max_model_tokens or describe(path)["longest"]
            built.pop_all()

    @torch.inference_mode()
    def open(self, messages: Sequence[Message], encoded: Sequence[Encoded | None], decoding: Decoding) -> Opened:
        """Everything up to the first token.

        encoded: of this one prompt, what each expert gave, in the router's order; None of one that gave nothing: the
            router sees its stand-in, or without one nothing in its place.  Empty where it asks for nothing.

        Raises:
            PromptError: when the policy cannot read the prompt, or it is too long.
        """
        names = self.shape.experts
        there = np.array([part is not None for part in encoded] or [True] * len(names))
        visible = there | np.array([name in self.stand_ins for name in names])
        prompt = Prompt(ordinal=0, task="", messages=tuple(messages), answer="")
        given = [part for part in encoded if part is not None]
        (seen,) = self.messages_for([prompt], self._texts(encoded))
        tokens = np.asarray(self.tokens_of(seen), dtype=np.int64)
        prefix, attention, gate = None, np.zeros(len(visible)), False
        if self.asks == "nothing" or (self.asks == "states" and given):
            shown = [self._in_place_of(index) if part is None else part for index, part in enumerate(encoded)]
            made = self.collaborate(self.snapshot, shown, [Draws(expert_mask=visible)])
            gate = made.prefix is not None and made.draws[0].open
            prefix = made.prefix[0] if made.prefix is not None and gate else None
            attention = attention if made.attention is None else made.attention[0].mean(axis=0)
        self._check(len(tokens), 0 if prefix is None else len(prefix), decoding.max_new_tokens)
        hidden = tuple(name for name, mine in zip(names, there, strict=True) if not mine)
        return Opened(tokens, prefix, attention, gate, hidden)

    def check_room(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> None:
        """Refuses prompts that do not fit in with a prefix and an answer of this length.

        Raises:
            PromptError: as `open`.
        """
        for messages in conversations:
            self._check(len(self.tokens_of(messages)), self._slots, max_new_tokens)

    def tokens_of(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the policy reads it.

        Raises:
            PromptError: when its chat template refuses it, or nothing is left of it.
        """
        try:
            tokens = self.policy.tokenize(messages)
        except (ChatError, UnicodeError) as error:
            raise PromptError(f"the policy cannot read this conversation: {error}") from error
        if len(tokens) < self._fewest:
            raise PromptError("the prompt is empty")
        return tokens

    def _check(self, prompt: int, slots: int, answer: int) -> None:
        if self.limit is not None and (total := prompt + slots + answer) > self.limit:
            raise PromptTooLongError(
                f"the policy's context is {self.limit} tokens; {prompt} of the prompt, {slots} of the prefix and "
                f"{answer} of the answer are {total}"
            )

    def stream(self, opened: Opened, decoding: Decoding) -> AsyncIterator[Piece]:
        """The answer's samples as they are made; a caller that stops listening ends them."""
        return self.engine.stream(opened.tokens, opened.prefix, decoding, self.snapshot)

    def _in_place_of(self, expert: int) -> Encoded:
        """An absent expert's stand-in; without one zeros, for the shapes: the router does not see them."""
        name = self.shape.experts[expert]
        state = self.stand_ins.get(name, np.zeros((1, self.shape.widths[expert]), np.float32))
        return Encoded(name, ("",), (state,), 0, 0, 0.0, (0,))

    def _texts(self, encoded: Sequence[Encoded | None]) -> list[Encoded]:
        """Answers of all experts, an absent one's empty."""
        if self.asks != "answers":
            return []
        return [
            Encoded(name, (), (), 0, 0, 0.0, (0,), ("",)) if part is None else part
            for name, part in zip(self.shape.experts, encoded, strict=True)
        ]
