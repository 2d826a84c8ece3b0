"""Collaborators beside the Perceiver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.config import RouterConfig
from experts.router import Perceiver, StaticPrefix


def config(**settings: object) -> RouterConfig:
    """A small router."""
    return RouterConfig.model_validate({"width": 16, "heads": 2, "latents": 3, "kind": "static", **settings})


def features(seed: int, batch: int = 4) -> list[torch.Tensor]:
    """States of two experts."""
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal((batch, 1, width)).astype(np.float32)) for width in (24, 8)]


def test_a_static_prefix_is_the_same_for_every_prompt_and_whatever_the_experts_say() -> None:
    torch.manual_seed(0)
    static = StaticPrefix(config(), (24, 8), 12, 1.0)
    seen = torch.ones(4, 2, dtype=torch.bool)
    one, other = static(features(0), seen), static(features(1), torch.tensor([[True, False]] * 4))
    assert one.prefix.shape == (4, 3, 12) and one.attention.shape == (4, 1, 3, 2)
    assert torch.equal(one.prefix, other.prefix) and torch.equal(one.prefix[0], one.prefix[3])
    assert not one.attention.any()


def test_every_parameter_of_a_static_prefix_is_trained_and_none_reads_an_expert() -> None:
    torch.manual_seed(0)
    static = StaticPrefix(config(), (24, 8), 12, 1.0)
    prefix = static(features(0), torch.ones(4, 2, dtype=torch.bool)).prefix
    (prefix * torch.randn_like(prefix)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in static.parameters())
    wide = StaticPrefix(config(), (240, 80, 8), 12, 1.0)
    assert sum(p.numel() for p in static.parameters()) == sum(p.numel() for p in wide.parameters())


@pytest.mark.parametrize("anchored", [False, True])
def test_it_starts_as_small_as_the_perceiver(anchored: bool) -> None:
    anchors = torch.randn(2, 12) if anchored else None
    seen = torch.ones(4, 2, dtype=torch.bool)
    sizes = []
    for kind in (Perceiver, StaticPrefix):
        torch.manual_seed(0)
        made = kind(config(), (24, 8), 12, 1.0, anchors)
        prefix = made(features(0), seen).prefix
        sizes.append((prefix - made.anchors if anchored else prefix).pow(2).mean().sqrt())
    assert 0.3 < sizes[1] / sizes[0] < 3
