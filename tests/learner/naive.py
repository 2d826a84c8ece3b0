"""The learner's arithmetic the slow way, in float64: each completion alone, no padding, no cache, no micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experts.loading import FrozenModel, load_frozen
from experts.state import Arrays, build_router, put_arrays
from learner.config import AlgorithmConfig
from rollout.types import Group, RewardStatus
from tests.learner.world import World, encode


def load_double(path: Path) -> FrozenModel:
    """A policy that computes in float64 throughout.

    transformers computes RMS norms and rotary angles in float32 whatever the model's type, so those modules get
    the same formulas in float64.
    """
    policy = load_frozen(str(path), "float64")
    for module in policy.model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
            )
        elif name.endswith("RotaryEmbedding"):
            module.forward = lambda x, position_ids, m=module: _rotary(m, position_ids)
    return policy


def _rotary(module: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].double() * module.inv_freq.double()
    both = torch.cat([angles, angles], dim=-1)
    return both.cos() * module.attention_scaling, both.sin() * module.attention_scaling


def naive_logprobs(
    policy: FrozenModel,
    prompt: np.ndarray,
    prefix: Tensor | None,
    tokens: np.ndarray,
    temperature: float,
    position: str,
) -> Tensor:
    """(tokens,) log-probabilities of one completion, from one forward over the whole sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]))
    embedded = policy.embed(ids)
    if prefix is not None:
        head = 1 if position == "after_bos" else 0
        embedded = torch.cat([embedded[:head], prefix.to(embedded.dtype), embedded[head:]])
    logits = policy.model(inputs_embeds=embedded[None], use_cache=False).logits[0, -len(tokens) - 1 : -1]
    return (logits / temperature).log_softmax(dim=-1)[torch.arange(len(tokens)), ids[-len(tokens) :]]


def router_of(world: World, policy: FrozenModel, arrays: Arrays) -> nn.Module:
    """A router with these weights, in float64."""
    router = build_router(world.router, world.shape, policy).float()
    put_arrays(router, arrays)
    return router.double()


def prefix_of(router: nn.Module, group: Group) -> Tensor:
    """(slots, width) one group's prefix."""
    features = [torch.from_numpy(e.features[0]).double()[None] for e in encode([group.prompt])]
    return router(features, torch.from_numpy(group.draws.expert_mask)[None]).prefix[0]


def plain_gradients(
    world: World, groups: Sequence[Group], arrays: dict[int, Arrays], current: int, config: AlgorithmConfig
) -> Arrays:
    """Gradients of GRPO with k3 against the policy without prefix, by one backward through router and policy.

    arrays: router weights by version; `current` is the one being trained.
    """
    policy = load_double(world.policy)
    routers = {version: router_of(world, policy, weights) for version, weights in arrays.items()}
    trained = router_of(world, policy, arrays[current])
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    ok = [[s.status is RewardStatus.OK for s in g.scores] for g in groups]
    count = sum(map(sum, ok))
    tokens = sum(
        len(c.tokens)
        for g, row in zip(groups, ok, strict=True)
        for c, fine in zip(g.completions, row, strict=True)
        if fine
    )
    weight_of = {
        "sequence": lambda n: 1 / (n * count),
        "token": lambda n: 1 / tokens,
        "constant": lambda n: 1 / ((config.constant_length or 0) * count),
    }[config.aggregation]
    total = torch.zeros((), dtype=torch.float64)
    for group, row in zip(groups, ok, strict=True):
        rewards = np.array([s.reward for s, fine in zip(group.scores, row, strict=True) if fine])
        if len(rewards) == 0 or np.ptp(rewards) < 1e-6:
            worth = np.zeros(len(rewards))
        else:
            worth = (rewards - rewards.mean()) / rewards.std(ddof=1)
        kept = [c for c, fine in zip(group.completions, row, strict=True) if fine]
        for completion, advantage in zip(kept, worth.tolist(), strict=True):

            def under(prefix: Tensor | None, group: Group = group, ids: np.ndarray = completion.tokens) -> Tensor:
                temperature = group.sampling.temperature
                return naive_logprobs(
                    policy, group.prompt_tokens, prefix, ids, temperature, world.router.prefix.position
                )

            mine = under(prefix_of(trained, group))
            with torch.no_grad():
                old = under(prefix_of(routers[group.router.version], group))
                reference = under(None)
                sampler = torch.from_numpy(completion.logprobs).double()
                correction = (old - sampler).exp().clamp_max(config.correction_cap)
            ratio = (mine - old).exp()
            surrogate = torch.minimum(
                ratio * advantage, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * advantage
            )
            k3 = (reference - mine).exp() - 1 - (reference - mine)
            per_token = -surrogate * correction + config.kl.coefficient * k3
            total = total + per_token.sum() * weight_of(len(completion.tokens))
    total.backward()
    return {name: p.grad.numpy() for name, p in trained.named_parameters() if p.grad is not None}
