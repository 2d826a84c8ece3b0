"""What a router costs is counted as its matrix products are, whoever reads it."""

from __future__ import annotations

import pytest
import torch

from experts.config import RouterConfig
from experts.operations import RouterOperations
from experts.router import router_class

WIDTHS, TOKENS, POLICY = (6, 10), (1, 3), 12
WIDTH, LATENTS = 16, 4
HIDDEN = 2 * WIDTH


def counted(kind: str, prompts: int, rows: int = 5, tokens: tuple[int, ...] = TOKENS) -> int:
    """Of a small router, on batches of some rows, half of them with a hidden expert."""
    config = RouterConfig(kind=kind, width=WIDTH, heads=4, latents=LATENTS, feedforward=2.0, gate=False)
    router = router_class(kind)(config, WIDTHS, POLICY, 0.1)
    features = [torch.randn(rows, count, width) for width, count in zip(WIDTHS, tokens, strict=True)]
    visible = torch.ones(rows, len(WIDTHS), dtype=torch.bool)
    visible[::2, 0] = False
    return RouterOperations(router)(features if kind == "perceiver" else [], visible, prompts)


def by_hand(prompts: int, tokens: tuple[int, ...] = TOKENS) -> int:
    """The perceiver's, product by product."""
    read = sum(2 * count * width * WIDTH for count, width in zip(tokens, WIDTHS, strict=True))
    keys = 2 * 2 * sum(tokens) * WIDTH * WIDTH
    attention = 2 * 2 * LATENTS * sum(tokens) * WIDTH
    return 2 * LATENTS * WIDTH * WIDTH + prompts * (
        read + keys + attention + 2 * LATENTS * (WIDTH * WIDTH + 2 * WIDTH * HIDDEN + WIDTH * POLICY)
    )


@pytest.mark.parametrize("prompts", [1, 7])
def test_a_perceivers_are_those_of_its_products(prompts: int) -> None:
    assert counted("perceiver", prompts) == counted("perceiver", prompts, rows=1) == by_hand(prompts)


def test_a_static_prefix_is_made_once_for_all_and_no_prefix_costs_nothing() -> None:
    once = 2 * LATENTS * (2 * WIDTH * HIDDEN + WIDTH * POLICY)
    assert counted("static", 1) == counted("static", 9) == once
    assert counted("none", 9) == 0


def test_longer_states_are_counted_anew() -> None:
    config = RouterConfig(width=WIDTH, heads=4, latents=LATENTS, feedforward=2.0, gate=False)
    operations = RouterOperations(router_class("perceiver")(config, WIDTHS, POLICY, 0.1))
    for tokens in (TOKENS, (2, 5), TOKENS):
        features = [torch.randn(2, count, width) for width, count in zip(WIDTHS, tokens, strict=True)]
        assert operations(features, torch.ones(2, 2, dtype=torch.bool), 2) == by_hand(2, tokens)
