"""Collaborators beside the Perceiver."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.config import RouterConfig
from experts.router import Perceiver, RouterOutput, StaticPrefix, Top1, chooses, closed_choice, router_class


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


def outputs(router: Perceiver, states: list[torch.Tensor], choice: list[int]) -> RouterOutput:
    """What it makes when it takes these choices."""
    return router(states, torch.ones(len(choice), 2, dtype=torch.bool), lambda _: torch.tensor(choice))


def test_of_a_top1_router_only_the_chosen_expert_counts() -> None:
    torch.manual_seed(0)
    router = Top1(config(kind="top1"), (24, 8), 12, 1.0)
    states = features(0)
    first = outputs(router, states, [0, 0, 1, 1])
    assert torch.equal(first.attention.sum(dim=-2)[:, 0] > 0, torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]]) > 0)
    other = [features(1)[0], states[1]]  # another first expert
    changed = (outputs(router, other, [0, 0, 1, 1]).prefix - first.prefix).abs().amax(dim=(1, 2)) > 0
    assert changed.tolist() == [True, True, False, False]


def test_a_top1_router_chooses_by_states_starts_undecided_and_never_takes_a_hidden_expert() -> None:
    torch.manual_seed(0)
    router = Top1(config(kind="top1"), (24, 8), 12, 1.0)
    options = outputs(router, features(0), [0] * 4).options
    assert options is not None and torch.allclose(options.exp(), torch.full((4, 2), 0.5))
    assert router.choose is not None
    for read in router.choose.read:
        torch.nn.init.normal_(read[1].weight)  # type: ignore[index]
    chances = outputs(router, features(0), [0] * 4).options
    assert chances is not None and chances.std(dim=0).min() > 0
    hidden = router(features(0), torch.tensor([[True, False]] * 4))
    assert torch.equal(hidden.options.exp()[:, 1], torch.zeros(4)) and not hidden.attention[..., 1].any()


def test_a_gate_is_mostly_open_at_first_and_leaves_the_prefix_as_it_is() -> None:
    torch.manual_seed(0)
    plain = Perceiver(config(kind="perceiver"), (24, 8), 12, 1.0)
    torch.manual_seed(0)
    gated = Perceiver(config(kind="perceiver", gate=True), (24, 8), 12, 1.0)
    seen = torch.ones(4, 2, dtype=torch.bool)
    out = gated(features(0), seen)
    assert torch.equal(out.prefix, plain(features(0), seen).prefix)
    assert 0.1 < out.options.exp()[0, 1].item() < 0.2
    assert closed_choice(gated, out.options) == 1 and not chooses(plain) and chooses(gated)


def test_a_null_expert_takes_attention_from_the_others() -> None:
    torch.manual_seed(0)
    router = Perceiver(config(kind="perceiver", null_expert=True), (24, 8), 12, 1.0)
    shares = router(features(0), torch.ones(4, 2, dtype=torch.bool)).attention.sum(dim=-1)
    assert shares.min() > 0 and shares.max() < 1
    with torch.no_grad():
        router.null.copy_(100 * router.latents[0])  # type: ignore[union-attr]
        router.query.weight.copy_(torch.eye(16))
        router.key.weight.copy_(torch.eye(16))
    blind = [router(features(seed), torch.ones(4, 2, dtype=torch.bool)).prefix[:, 0] for seed in (0, 1)]
    assert torch.allclose(*blind, atol=1e-6), "what attends to the null expert alone sees no other"


@pytest.mark.parametrize("kind", ["none", "text"])
def test_no_prefix_means_no_slots_and_no_parameters(kind: str) -> None:
    router = router_class(kind)(config(kind=kind), (24, 8), 12, 1.0)
    out = router([], torch.ones(4, 2, dtype=torch.bool))
    assert out.prefix.shape == (4, 0, 12) and not list(router.parameters())
    assert out.attention.shape == (4, 1, 1, 2) and not out.attention.any()


@pytest.mark.parametrize("key", ["gate", "null_expert"])
def test_what_a_router_without_states_cannot_use_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"router.{key} is for a router that reads states"):
        config(**{key: True})
