"""Floating-point operations of a router, counted by torch while it makes a prefix."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class RouterOperations:
    """Of a router's forward pass; matrix products are counted, as with every model here."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router
        self._known: dict[tuple[torch.Size, ...], tuple[int, int]] = {}

    def __call__(
        self,
        features: Sequence[Float[Tensor, "batch tokens width"]],
        visible: Bool[Tensor, "batch experts"],
        prompts: int,
    ) -> int:
        """For so many prompts like these at once; counted the first time that states have these lengths.

        Some of it does not depend on their number: latents are the same for all, and a static prefix is made once.
        """
        shapes = tuple(feature.shape[1:] for feature in features)
        if shapes not in self._known:
            one, two = (self._counted(features, visible, count) for count in (1, 2))
            self._known[shapes] = (2 * one - two, two - one)
        once, each = self._known[shapes]
        return once + each * prompts

    def _counted(self, features: Sequence[Tensor], visible: Tensor, count: int) -> int:
        same = [feature[:1].expand(count, -1, -1) for feature in features]
        # Of a copy without gradients: torch's counter hooks into them, and stumbles over a view of a parameter.
        router = copy.deepcopy(self._router).requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            router(same, torch.ones_like(visible[:1]).expand(count, -1))
        return counter.get_total_flops()
