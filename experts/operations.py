"""Floating-point operations of a router, counted by torch while it makes a prefix."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experts.router import chooses

States = tuple[int, int]  # how many of an expert about a prompt, and their width


class RouterOperations:
    """Of a router's forward pass; matrix products are counted, as with every model here.

    The router's parameters must not ask for gradients.
    """

    def __init__(self, router: nn.Module, experts: int, device: torch.device | str) -> None:
        self._router, self._experts, self._device = router, experts, device
        self._known: dict[tuple[States, ...], tuple[int, int]] = {}

    def __call__(self, states: Sequence[States], prompts: int) -> int:
        """For so many prompts at once, with states like these; counted the first time that states have these lengths.

        Some of it does not depend on their number: latents are the same for all, and a static prefix is made once.
        A router of your own that cannot be counted costs nothing, and a warning says so.
        """
        key = tuple(states)
        if key not in self._known:
            try:
                two, three = (self._counted(key, count) for count in (2, 3))
            except Exception as error:  # noqa: BLE001 - whatever a plug-in raises: a statistic must not end a run
                logging.getLogger(__name__).warning("the router's operations cannot be counted, and are 0: %s", error)
                two, three = 0, 0
            self._known[key] = (3 * two - 2 * three, three - two)
        once, each = self._known[key]
        return once + each * prompts

    def _counted(self, states: Sequence[States], prompts: int) -> int:
        features = [torch.ones(prompts, *shape, device=self._device) for shape in states]
        visible = torch.ones(prompts, self._experts, dtype=torch.bool, device=self._device)
        pick = [_most_likely] if chooses(self._router) else []
        # Fused attention is not counted on every device; its products are.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._router(features, visible, *pick)
        return counter.get_total_flops()


def states_of(features: Sequence[Sequence[np.ndarray]]) -> list[States]:
    """What experts gave for some prompts, as `experts.state.stack_features` stacks it."""
    return [(max(len(feature) for feature in mine), mine[0].shape[1]) for mine in features]


def _most_likely(options: Tensor) -> Tensor:
    return options.argmax(dim=-1)
