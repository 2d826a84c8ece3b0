"""A fresh router that first learns to say in its prefix what the experts say in text.

Experts' states hold their answers in a form that the policy cannot read; from rewards alone a router takes hundreds of
updates to find how to put it.  But what the policy could read is known: its own embeddings of those answers.  The warm
start is a regression from states to them.  It needs no verifier and no gold answer, and the experts decode for it once,
on some training prompts, and never again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from experts.config import WarmStartConfig
from experts.loading import FrozenModel
from experts.router import chooses

WARMUP_STEPS = 20
HELD_OUT = 0.1


class WarmStartError(ValueError):
    """A warm start that cannot be."""


@dataclass(frozen=True)
class Spoken:
    """What a prefix is to be like: (prompts, slots, width) embeddings, and which of them there are."""

    embeddings: Float[Tensor, "prompts slots width"]
    present: Bool[Tensor, "prompts slots"]


def spoken(texts: Sequence[str], policy: FrozenModel, slots: int) -> Spoken:
    """The policy's embeddings of the first tokens of some texts, as many as a prefix has slots."""
    embeddings = torch.zeros(len(texts), slots, policy.width)
    present = torch.zeros(len(texts), slots, dtype=torch.bool)
    for row, text in enumerate(texts):
        tokens = policy.chat.text_tokens(text)[:slots]
        if tokens:
            embeddings[row, : len(tokens)] = policy.embed(torch.tensor(tokens, device=policy.device)).float().cpu()
            present[row, : len(tokens)] = True
    return Spoken(embeddings, present)


def warm_start(
    router: nn.Module,
    features: Sequence[Float[Tensor, "prompts tokens width"]],
    experts: int,
    wanted: Spoken,
    config: WarmStartConfig,
    seed: int,
) -> tuple[float, float]:
    """Trains the router in place to make these prefixes; slots that a text does not fill are left alone.

    Returns the mean squared error on prompts held out of it before and after, relative to the embeddings' size.

    Raises:
        WarmStartError: when there is nothing to learn.
    """
    if not wanted.present.any():
        raise WarmStartError("router.warm_start: the experts' answers and router.text.template give no text to learn")
    prompts = len(wanted.embeddings)
    scale = wanted.embeddings[wanted.present].pow(2).mean()
    held = max(1, int(HELD_OUT * prompts))
    visible = torch.ones(prompts, experts, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    # An adapter of the policy, which has no part in the prefix, gets no gradient and stays as it is.
    optimizer = torch.optim.AdamW(router.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    def error(rows: Tensor) -> Tensor:
        some = [feature[rows] for feature in features]
        # A router that chooses tries its options in turn.
        pick = [lambda options: torch.arange(len(options)) % options.shape[1]] if chooses(router) else []
        made = router(some, visible[rows], *pick).prefix
        off = (made - wanted.embeddings[rows])[wanted.present[rows]]
        return off.pow(2).sum() / max(off.numel(), 1) / scale

    with torch.no_grad():
        before = error(torch.arange(held)).item()
    for step in range(config.steps):
        share = min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * share
        optimizer.zero_grad()
        error(held + torch.randint(prompts - held, (config.batch,), generator=generator)).backward()
        optimizer.step()
    with torch.no_grad():
        return before, error(torch.arange(held)).item()
