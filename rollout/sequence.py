"""The one place that lays out prefix, prompt and completion, with masks and position ids.

Rollout, learner and zoo building all call this module, so that what is trained on is, to the last
position id, what was sampled.  A batch is laid out as

    front:      [slots][masked padding][prompt] | [completion][masked padding]
    after_bos:  [first token][slots][masked padding][rest of the prompt] | [completion]...

and a token's position id is the number of unmasked tokens before it, so that padding never shows:
an engine without padding sees the same sequence.  "No prefix" means no slots at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PrefixPosition = Literal["front", "after_bos"]
Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class PromptBatch:
    """Prompts laid out behind (or around) the prefix's slots.

    tokens: (batch, length) prompt tokens, padded as described above; the slots are not in it.
    mask: (batch, slots + length) 1 where the policy attends.
    positions: (batch, slots + length) position ids; masked columns hold 0.
    head: how many token columns stand before the slots (0 or 1).
    """

    tokens: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch total"]
    positions: Int[Tensor, "batch total"]
    slots: int
    head: int

    def rows(self, index: slice) -> PromptBatch:
        """Some of the prompts, in the same layout."""
        return PromptBatch(self.tokens[index], self.mask[index], self.positions[index], self.slots, self.head)


@dataclass(frozen=True)
class CompletionBatch:
    """Completions laid out behind their prompts.

    tokens: (rows, length) right-padded.
    valid: (rows, length) True on real tokens (the end token is one).
    mask: (rows, prompt total + length) attention over prefix, prompt and completion.
    positions: (rows, length)
    """

    tokens: Int[Tensor, "rows length"]
    valid: Bool[Tensor, "rows length"]
    mask: Int[Tensor, "rows total"]
    positions: Int[Tensor, "rows length"]


def running_positions(mask: Int[Tensor, "batch total"]) -> Int[Tensor, "batch total"]:
    """Number of unmasked tokens before each column (0 for masked leading columns)."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def next_positions(mask: Int[Tensor, "rows total"]) -> Int[Tensor, "rows 1"]:
    """Position id of the token that follows each row."""
    return mask.sum(dim=1, keepdim=True)


def lay_out_prompts(
    prompts: Sequence[Tokens],
    slots: int,
    pad_id: int,
    position: PrefixPosition = "front",
    slot_mask: Bool[Tensor, "batch slots"] | None = None,
    device: torch.device | str = "cpu",
) -> PromptBatch:
    """Lays out a batch of prompts with `slots` prefix columns.

    slot_mask: False hides a row's slot (a closed gate, or a training document without a hint);
        None shows all.

    Raises:
        ValueError: on an empty prompt, which would leave the policy nothing to read, and on one of a
            single token with `after_bos`, which would leave it nothing behind the prefix.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise ValueError("cannot lay out an empty prompt: every prompt needs at least one token")
    head = 1 if position == "after_bos" and slots else 0
    if head and min(lengths) == 1:
        raise ValueError("with router.prefix.position: after_bos every prompt needs at least two tokens")
    longest = max(lengths)
    tokens = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    real = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        start = longest - lengths[row] + head
        tokens[row, start:], real[row, start:] = prompt[head:], 1
        tokens[row, :head], real[row, :head] = prompt[:head], 1
    token_mask = torch.from_numpy(real)
    shown = (
        torch.ones(len(prompts), slots, dtype=torch.int64) if slot_mask is None else slot_mask.to("cpu", torch.int64)
    )
    mask = torch.cat([token_mask[:, :head], shown, token_mask[:, head:]], dim=1).to(device)
    return PromptBatch(torch.from_numpy(tokens).to(device), mask, running_positions(mask), slots, head)


def lay_out_completions(prompts: PromptBatch, completions: Sequence[Sequence[Tokens]], pad_id: int) -> CompletionBatch:
    """Lays out completions behind their prompts; rows are prompt-major (all of prompt 0 first).

    Raises:
        ValueError: when the prompts have different numbers of completions, or one is empty.
    """
    samples = {len(group) for group in completions}
    if len(completions) != len(prompts.tokens) or len(samples) != 1:
        raise ValueError(f"{len(prompts.tokens)} prompts need equally many completions each; got counts {samples}")
    flat = [completion for group in completions for completion in group]
    if min(len(completion) for completion in flat) == 0:
        raise ValueError("a completion has no token: an engine must return at least the end token")
    longest = max(len(completion) for completion in flat)
    tokens = np.full((len(flat), longest), pad_id, dtype=np.int64)
    valid = np.zeros((len(flat), longest), dtype=bool)
    for row, completion in enumerate(flat):
        tokens[row, : len(completion)], valid[row, : len(completion)] = completion, True
    device = prompts.mask.device
    before = prompts.mask.repeat_interleave(samples.pop(), dim=0)
    shown = torch.from_numpy(valid).to(device)
    positions = next_positions(before) + torch.arange(longest, device=device)
    return CompletionBatch(
        torch.from_numpy(tokens).to(device), shown, torch.cat([before, shown.long()], dim=1), positions
    )


def with_prefix(
    embedded: Float[Tensor, "batch length width"], prefix: Float[Tensor, "batch slots width"] | None, batch: PromptBatch
) -> Float[Tensor, "batch total width"]:
    """Puts the prefix into its slots between the prompt's embedded tokens.

    Raises:
        ValueError: when the prefix does not have the layout's number of slots.
    """
    if batch.slots == 0 and prefix is None:
        return embedded
    if prefix is None or prefix.shape[1] != batch.slots:
        raise ValueError(
            f"the layout has {batch.slots} slots, the prefix {None if prefix is None else prefix.shape[1]}"
        )
    return torch.cat([embedded[:, : batch.head], prefix.to(embedded.dtype), embedded[:, batch.head :]], dim=1)
