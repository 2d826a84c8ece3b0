"""Log-probabilities of completions under a frozen policy behind a soft prefix, differentiable in the prefix.

The prompt part is computed once per group; its keys and values are shared, with gradient, by the
group's completions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

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
    """Per-token statistics of group-major completions; padding columns hold meaningless values."""
    from transformers import DynamicCache

    samples = len(completions.tokens) // len(prompts.tokens)
    cache = DynamicCache()
    out = policy.model(
        inputs_embeds=with_prefix(policy.embed(prompts.tokens), prefix, prompts),
        attention_mask=prompts.mask,
        position_ids=prompts.positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits.repeat_interleave(samples, dim=0)
    if completions.tokens.shape[1] > 1:
        cache.batch_repeat_interleave(samples)
        out = policy.model(
            input_ids=completions.tokens[:, :-1],
            attention_mask=completions.mask[:, :-1],
            position_ids=completions.positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, out.logits], dim=1)
    return token_statistics(logits, completions.tokens, temperature)


def token_statistics(
    logits: Float[Tensor, "rows tokens vocabulary"], tokens: Tensor, temperature: float
) -> TokenStatistics:
    """Log-probabilities at a temperature; half precision is raised to float32 first."""
    scaled = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    logprobs = scaled.log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return TokenStatistics(logprobs.gather(2, tokens[:, :, None])[:, :, 0], entropy)
