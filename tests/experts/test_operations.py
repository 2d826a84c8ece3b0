"""What a router costs is counted as its matrix products are, whoever reads it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from experts.config import RouterConfig
from experts.operations import RouterOperations
from experts.router import router_class

WIDTHS, TOKENS, POLICY = (6, 10), (1, 3), 12
WIDTH, LATENTS = 16, 4
HIDDEN = 2 * WIDTH


def counting(kind: str, **settings: object) -> RouterOperations:
    """Of a small router."""
    config = RouterConfig.model_validate(
        {"kind": kind, "width": WIDTH, "heads": 4, "latents": LATENTS, "feedforward": 2.0, "gate": False} | settings
    )
    router = router_class(kind)(config, WIDTHS, POLICY, 0.1)
    return RouterOperations(router.requires_grad_(False), len(WIDTHS), "cpu")


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
    operations = counting("perceiver")
    for tokens in (TOKENS, (2, 5), TOKENS):
        assert operations(list(zip(tokens, WIDTHS, strict=True)), prompts) == by_hand(prompts, tokens)


def test_a_static_prefix_is_made_once_for_all_and_no_prefix_costs_nothing() -> None:
    once = 2 * LATENTS * (2 * WIDTH * HIDDEN + WIDTH * POLICY)
    static = counting("static")
    assert static([], 1) == static([], 9) == once
    assert counting("none")([], 9) == 0


@pytest.mark.parametrize("kind", ["perceiver", "top1"])
def test_a_router_that_chooses_is_counted_with_what_it_chooses_by(kind: str) -> None:
    states, chooser = list(zip(TOKENS, WIDTHS, strict=True)), counting(kind, gate=True)
    options = 2 if kind == "perceiver" else 3
    assert chooser(states, 4) - by_hand(4) == 4 * 2 * len(WIDTHS) * WIDTH * options


class Attentive(nn.Module):
    """A router of somebody's own, with torch's attention, batch statistics and no `pick` of its own."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.norm, self.broken, self.lock = nn.BatchNorm1d(WIDTHS[0]), broken, threading.Lock()

    def forward(self, features: list[torch.Tensor], visible: torch.Tensor) -> torch.Tensor:
        """Self-attention over the first expert's states."""
        if self.broken:
            raise RuntimeError("one prompt at a time, please")
        states = self.norm(features[0].flatten(0, 1)).view_as(features[0])
        heads = states[:, None]  # with heads, torch fuses it on every device
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)


def test_fused_attention_counts_as_its_products() -> None:
    counted = RouterOperations(Attentive(broken=False), len(WIDTHS), "cpu")([(5, WIDTHS[0])], 3)
    assert counted == 3 * 2 * 2 * 5 * 5 * WIDTHS[0]


def test_a_router_that_cannot_be_counted_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert RouterOperations(Attentive(broken=True), len(WIDTHS), "cpu")([(5, WIDTHS[0])], 3) == 0
    assert "cannot be counted, and are 0: one prompt at a time, please" in caplog.text
