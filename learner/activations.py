"""Activation checkpointing of a frozen policy that reads and writes a key-value cache.

transformers' own refuses a cache, because computing a layer a second time would write to it a second time.  Here a
layer that is computed again reads the cache as it was before, and what it writes is dropped.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from experts.loading import FrozenModel, ModelError
from learner.token_logprobs import replaced_forward


@contextlib.contextmanager
def checkpointed(policy: FrozenModel) -> Iterator[None]:
    """Forward passes of the block keep each decoder layer's input alone, and backward computes the rest again.

    Raises:
        ModelError: for a model whose decoder layers cannot be told.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in policy.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"model {policy.name!r}: learner.checkpoint_activations cannot find the layers of a "
            f"{type(policy.model).__name__}: set it to false"
        )
    with contextlib.ExitStack() as stack:
        for layer in layers:
            index = next((m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")), 0)
            stack.enter_context(replaced_forward(layer, partial(_checkpointed, layer.forward, index)))
        yield


def _checkpointed(forward: Callable[..., Any], index: int, *args: Any, **kwargs: Any) -> Any:
    from transformers import Cache

    count, inputs = len(args), dict(enumerate(args)) | kwargs
    caches = {key: value for key, value in inputs.items() if isinstance(value, Cache)}
    before = {key: _snapshot(cache, index) for key, cache in caches.items()}

    def run(others: dict[Any, Any]) -> Any:
        # The real caches the first time alone, and not kept: they hold every layer's keys and values.
        mine = dict(caches) or {key: _snapshot(cache, index) for key, cache in before.items()}
        caches.clear()
        everything = others | mine
        return forward(*[everything.pop(at) for at in range(count)], **everything)

    others = {key: value for key, value in inputs.items() if key not in caches}
    return checkpoint(run, others, use_reentrant=False, preserve_rng_state=False)


def _snapshot(cache: Any, index: int) -> Any:
    """A cache that holds one layer's states alone; writing to it leaves the original as it is."""
    taken = copy.copy(cache)
    taken.layers = [_copied(layer) if at == index else None for at, layer in enumerate(cache.layers)]
    return taken


def _copied(layer: Any) -> Any:
    """Attention layers replace their tensors; recurrent ones write into the tensors of their lists."""
    taken = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, list):
            setattr(taken, name, [v.clone() if isinstance(v, Tensor) else v for v in value])
        elif isinstance(value, dict):
            setattr(taken, name, {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()})
    return taken
