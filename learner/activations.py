"""Activation checkpointing of a frozen policy that reads and writes a key-value cache.

transformers' own refuses a cache, because computing a layer a second time would write to it a second time.  Here a
layer that is computed again reads the cache as it was before, and what it writes is dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from experts.kv_cache import one_layer
from experts.loading import FrozenModel, ModelError
from learner.token_logprobs import replaced_forward


@contextlib.contextmanager
def checkpointed(policy: FrozenModel, rows: Int[Tensor, " rows"] | None = None) -> Iterator[None]:
    """Forward passes of the block keep each decoder layer's input alone, and backward computes the rest again.

    Args:
        rows: for a pass that goes on from a cache, which of the cache's rows each of its own goes on from.  Every layer
            selects its own, so that no more than one layer's selection is held; the cache stays as it is.

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
            stack.enter_context(replaced_forward(layer, partial(_checkpointed, layer.forward, index, rows)))
        yield


def _checkpointed(
    forward: Callable[..., Any], index: int, rows: Int[Tensor, " rows"] | None, *args: Any, **kwargs: Any
) -> Any:
    from transformers import Cache

    count, inputs = len(args), dict(enumerate(args)) | kwargs
    caches = {key: value for key, value in inputs.items() if isinstance(value, Cache)}
    before = {key: one_layer(cache, index) for key, cache in caches.items()}
    written = caches if rows is None else {}

    def run(others: dict[Any, Any]) -> Any:
        # Into the real cache the first time alone, and it is not kept: it holds every layer's keys and values.
        mine = dict(written) or {key: one_layer(cache, index, rows) for key, cache in before.items()}
        written.clear()
        everything = others | mine
        return forward(*[everything.pop(at) for at in range(count)], **everything)

    others = {key: value for key, value in inputs.items() if key not in caches}
    return checkpoint(run, others, use_reentrant=False, preserve_rng_state=False)
