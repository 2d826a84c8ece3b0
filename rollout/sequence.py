"""The one place that lays out prefix, prompt and completion, with masks and position ids.

Rollout, learner and zoo building all call this module, so that what is trained on is, to the last
position id, what was sampled.  A batch is laid out as

    front:      [masked padding][slots][prompt] | [completion][masked padding]
    after_bos:  [masked padding][first token][slots][rest of the prompt] | [completion]...

and a token's position id is the number of unmasked tokens before it.  A row without prefix has no slots: a closed
row is [masked padding][prompt].  So every row is contiguous, and padding never shows, whether a model counts
positions, or columns, as sliding windows, ALiBi and convolutions do: an engine without padding sees the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LAYOUT = 2  # version of the above; 1 had the padding between slots and prompt
PrefixPosition = Literal["front", "after_bos"]
Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class PromptBatch:
    """Prompts laid out behind (or around) the prefix's slots; every row ends in the last column.

    tokens: (batch, total) token ids; the pad id on padding and in slots.
    mask: (batch, total) 1 where the policy attends.
    positions: (batch, total) position ids; masked columns hold 0.
    slot: (batch, total) which of the prefix's vectors stands in a column; -1 where none does.
    slots: how many vectors a prefix has.
    """

    tokens: Int[Tensor, "batch total"]
    mask: Int[Tensor, "batch total"]
    positions: Int[Tensor, "batch total"]
    slot: Int[Tensor, "batch total"]
    slots: int


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
    """Lays out a batch of prompts, each with as many of the `slots` as it shows.

    slot_mask: False leaves out a row's slot (a closed gate, or a training document without a hint);
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
    shown = np.ones((len(prompts), slots), bool) if slot_mask is None else slot_mask.cpu().numpy()
    total = max(np.array(lengths) + shown.sum(axis=1))
    tokens = np.full((len(prompts), total), pad_id, dtype=np.int64)
    slot = np.full((len(prompts), total), -1, dtype=np.int64)
    mask = np.zeros((len(prompts), total), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        own = np.flatnonzero(shown[row])
        start = total - len(own) - lengths[row]
        behind = start + head + len(own)
        tokens[row, start : start + head], tokens[row, behind:] = prompt[:head], prompt[head:]
        slot[row, start + head : behind], mask[row, start:] = own, 1
    laid = [torch.from_numpy(array).to(device) for array in (tokens, mask, slot)]
    return PromptBatch(laid[0], laid[1], running_positions(laid[1]), laid[2], slots)


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
    embedded: Float[Tensor, "batch total width"], prefix: Float[Tensor, "batch slots width"] | None, batch: PromptBatch
) -> Float[Tensor, "batch total width"]:
    """Puts the prefix into its slots among the layout's embedded tokens.

    Raises:
        ValueError: when the prefix does not have the layout's number of slots.
    """
    if batch.slots == 0 and prefix is None:
        return embedded
    if prefix is None or prefix.shape[1] != batch.slots:
        raise ValueError(
            f"the layout has {batch.slots} slots, the prefix {None if prefix is None else prefix.shape[1]}"
        )
    row, column = (batch.slot >= 0).nonzero(as_tuple=True)
    return embedded.index_put((row, column), prefix.to(embedded.dtype)[row, batch.slot[row, column]])
