"""From groups to tensors: micro-batches by tokens, rewards and masks, global denominators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.choices import group_advantages
from learner.losses import Denominators
from rollout.sequence import CompletionBatch
from rollout.types import FinishReason, Group, RewardStatus

WORTH_A_PASS = 1024  # padded tokens that cost about as much as the fixed costs of another pass


@dataclass(frozen=True)
class Targets:
    """Rewards and sampling log-probabilities of some groups, laid out like their completions.

    rewards, ok: (groups, samples) float64 and bool.  sampler: (rows, tokens) float32.
    valid: (rows, tokens) real tokens of `ok` completions.
    """

    rewards: Tensor
    ok: Tensor
    sampler: Tensor
    valid: Tensor


def ok_mask(groups: Sequence[Group]) -> np.ndarray:
    """(groups, samples) True where the verifier answered."""
    return np.array([[score.status is RewardStatus.OK for score in group.scores] for group in groups], dtype=bool)


def global_denominators(groups: Sequence[Group], constant_length: int | None) -> Denominators:
    """Counted over the whole update, before any rank starts."""
    ok = ok_mask(groups)
    lengths = np.array([[len(c.tokens) for c in group.completions] for group in groups])
    completions, tokens = int(ok.sum()), int((lengths * ok).sum())
    return Denominators(completions, tokens, constant_length or 0, len(groups), group_advantages(groups))


def micro_batches(groups: Sequence[Group], slots: int, limit: int) -> Iterator[list[int]]:
    """Indices of whole groups, shortest prompts first, that the frozen policy sees together.

    A micro-batch stays within `limit` padded tokens (one group at least), and a new one starts before
    padding costs more than another pass would.
    """
    chosen: list[int] = []
    total = _Padding()
    for index in sorted(range(len(groups)), key=lambda i: len(groups[i].prompt_tokens)):
        with_this = total.plus(groups[index], slots)
        if chosen and (with_this.padded > limit or with_this.padded - with_this.real > WORTH_A_PASS):
            yield chosen
            chosen, with_this = [], _Padding().plus(groups[index], slots)
        chosen, total = [*chosen, index], with_this
    if chosen:
        yield chosen


@dataclass(frozen=True)
class _Padding:
    """What some groups cost together: their longest prompt and completion, how many of both, and their real tokens."""

    prompt: int = 0
    completion: int = 0
    prompts: int = 0
    completions: int = 0
    real: int = 0

    @property
    def padded(self) -> int:
        return self.prompts * self.prompt + self.completions * self.completion

    def plus(self, group: Group, slots: int) -> _Padding:
        lengths = [len(completion.tokens) for completion in group.completions]
        prompt = len(group.prompt_tokens) + slots
        return _Padding(
            max(self.prompt, prompt),
            max(self.completion, *lengths),
            self.prompts + 1,
            self.completions + len(lengths),
            self.real + prompt + sum(lengths),
        )


def targets(groups: Sequence[Group], completions: CompletionBatch) -> Targets:
    """Rewards and masks for completions laid out by `rollout.sequence`."""
    device = completions.tokens.device
    ok = ok_mask(groups)
    rewards = np.array([[s.reward if s.status is RewardStatus.OK else 0.0 for s in g.scores] for g in groups])
    sampler = np.zeros(completions.tokens.shape, dtype=np.float32)
    for row, completion in enumerate(c for group in groups for c in group.completions):
        sampler[row, : len(completion.logprobs)] = completion.logprobs
    rows_ok = torch.from_numpy(ok.reshape(-1)).to(device)
    return Targets(
        rewards=torch.from_numpy(rewards).to(device),
        ok=torch.from_numpy(ok).to(device),
        sampler=torch.from_numpy(sampler).to(device),
        valid=completions.valid & rows_ok[:, None],
    )


def truncated_fraction(groups: Sequence[Group]) -> float:
    """Share of completions cut by the length limit."""
    finishes = [completion.finish for group in groups for completion in group.completions]
    return sum(finish is FinishReason.LENGTH for finish in finishes) / max(len(finishes), 1)
