"""Log-probabilities of completions under a frozen policy behind a soft prefix, differentiable in the prefix.

The prompt part is computed once per group; its keys and values are shared, with gradient, by the
group's completions.
"""

from __future__ import annotations

import contextlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experts.kv_cache import fewest_columns, new_cache, select_rows
from experts.loading import FrozenModel
from learner.activations import checkpointed
from learner.token_logprobs import CHUNK, Head, TokenStatistics, token_statistics
from rollout.sequence import CompletionBatch, PromptBatch, with_prefix


def completion_logprobs(
    policy: FrozenModel,
    prompts: PromptBatch,
    prefix: Float[Tensor, "groups slots width"] | None,
    completions: CompletionBatch,
    temperature: float,
    checkpoint_activations: bool = False,
) -> TokenStatistics:
    """Per-token statistics of group-major completions; padding columns hold zeros.

    Equal completions of a group are computed once: short answers are mostly alike.

    Args:
        checkpoint_activations: see `learner.activations`; without gradients it has no effect.
    """
    rows, inverse = distinct_rows(completions, len(prompts.tokens))
    tokens, valid = completions.tokens[rows], completions.valid[rows]
    head = Head(policy)
    saving = checkpoint_activations and torch.is_grad_enabled()
    hidden = _hidden_states(policy, head, prompts, prefix, completions, rows, saving)
    chunk = max(CHUNK // policy.model.config.vocab_size, 1)
    found = token_statistics(head, hidden[valid], tokens[valid], temperature, chunk, head.trains)
    # Row by row again, and every equal row of its own.
    logprobs, entropy = (torch.zeros_like(tokens, dtype=of.dtype).masked_scatter(valid, of) for of in found)
    return TokenStatistics(logprobs[inverse], entropy[inverse])


def _hidden_states(
    policy: FrozenModel,
    head: Head,
    prompts: PromptBatch,
    prefix: Float[Tensor, "groups slots width"] | None,
    completions: CompletionBatch,
    rows: Int[Tensor, " rows"],
    checkpoint: bool,
) -> Float[Tensor, "rows tokens width"]:
    """What the logits of the rows' tokens are made from."""
    group = rows // (len(completions.tokens) // len(prompts.tokens))
    tokens = completions.tokens[rows]
    cache = new_cache(policy.model.config)
    with checkpointed(policy) if checkpoint else contextlib.nullcontext():
        first = head.hidden_states(
            **policy.inputs(prompts.tokens, with_prefix(policy.embed(prompts.tokens), prefix, prompts)),
            attention_mask=prompts.mask,
            position_ids=prompts.positions,
            past_key_values=cache,
            use_cache=True,
        )[group, -1:]
    given = tokens.shape[1] - 1
    if not given:
        return first
    read = max(given, fewest_columns(cache))
    if not checkpoint:
        select_rows(cache, group)
    with checkpointed(policy, group) if checkpoint else contextlib.nullcontext():
        rest = head.hidden_states(
            input_ids=tokens[:, :read],
            attention_mask=completions.mask[rows, : prompts.mask.shape[1] + read],
            position_ids=completions.positions[rows, :read],
            past_key_values=cache,
            use_cache=True,
        )
    return torch.cat([first, rest[:, :given]], dim=1)


def distinct_rows(completions: CompletionBatch, groups: int) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " rows"]]:
    """One row of each distinct completion of each group, group-major, and which of them every row equals."""
    group = torch.arange(groups, device=completions.tokens.device).repeat_interleave(len(completions.tokens) // groups)
    key = torch.cat([group[:, None], completions.tokens, completions.valid.long()], dim=1)
    unique, inverse = torch.unique(key, dim=0, return_inverse=True)
    rows = torch.empty(len(unique), dtype=torch.long, device=key.device)
    rows[inverse.flip(0)] = torch.arange(len(key), device=key.device).flip(0)
    return rows, inverse
