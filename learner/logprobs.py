"""Log-probabilities of completions under a frozen policy behind a soft prefix, differentiable in the prefix.

The prompt part is computed once per group; its keys and values are shared, with gradient, by the
group's completions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experts.kv_cache import fewest_columns, new_cache, select_rows
from experts.loading import FrozenModel
from learner.losses import PerToken
from rollout.sequence import CompletionBatch, PromptBatch, with_prefix


class TokenStatistics(NamedTuple):
    """logprobs: of the completions' tokens, with gradient; entropy: of each next-token distribution, without."""

    logprobs: PerToken
    entropy: PerToken


def completion_logprobs(
    policy: FrozenModel,
    prompts: PromptBatch,
    prefix: Float[Tensor, "groups slots width"] | None,
    completions: CompletionBatch,
    temperature: float,
) -> TokenStatistics:
    """Per-token statistics of group-major completions; padding columns hold meaningless values.

    Equal completions of a group are computed once: short answers are mostly alike.
    """
    rows, inverse = distinct_rows(completions, len(prompts.tokens))
    group = rows // (len(completions.tokens) // len(prompts.tokens))
    tokens = completions.tokens[rows]
    cache = new_cache(policy.model.config)
    out = policy.model(
        **policy.inputs(prompts.tokens, with_prefix(policy.embed(prompts.tokens), prefix, prompts)),
        attention_mask=prompts.mask,
        position_ids=prompts.positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[group]
    given = tokens.shape[1] - 1
    if given:
        select_rows(cache, group)
        read = max(given, fewest_columns(cache))
        out = policy.model(
            input_ids=tokens[:, :read],
            attention_mask=completions.mask[rows, : prompts.mask.shape[1] + read],
            position_ids=completions.positions[rows, :read],
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, out.logits[:, :given]], dim=1)
    distinct = token_statistics(logits, tokens, temperature)
    return TokenStatistics(distinct.logprobs[inverse], distinct.entropy[inverse])


def distinct_rows(completions: CompletionBatch, groups: int) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " rows"]]:
    """One row of each distinct completion of each group, group-major, and which of them every row equals."""
    group = torch.arange(groups, device=completions.tokens.device).repeat_interleave(len(completions.tokens) // groups)
    key = torch.cat([group[:, None], completions.tokens, completions.valid.long()], dim=1)
    unique, inverse = torch.unique(key, dim=0, return_inverse=True)
    rows = torch.empty(len(unique), dtype=torch.long, device=key.device)
    rows[inverse.flip(0)] = torch.arange(len(key), device=key.device).flip(0)
    return rows, inverse


def token_statistics(
    logits: Float[Tensor, "rows tokens vocabulary"], tokens: Tensor, temperature: float
) -> TokenStatistics:
    """Log-probabilities at a temperature; half precision is raised to float32 first."""
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logprobs = scaled.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return TokenStatistics(logprobs.gather(2, tokens[:, :, None])[:, :, 0], entropy)
