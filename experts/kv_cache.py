"""What a policy remembers of the tokens it has read: keys, values and the states of recurrent layers.

The one module that knows the inside of transformers' caches.  A cache's rows are sequences that all end in the same
column; a layer with a sliding window holds the last columns only, and a recurrent layer has no columns at all.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from experts.loading import ModelError

KINDS = (  # of layers, whose rows can be selected and joined
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)


def new_cache(config: Any) -> Any:
    """An empty cache for a model of this configuration.

    Raises:
        ModelError: when the model has a kind of layer whose rows could not be selected.
    """
    from transformers import DynamicCache

    try:
        cache = DynamicCache(config=config)
    except KeyError as error:
        raise ModelError(f"its layers of type {error.args[0]} have no cache in transformers") from error
    for layer in cache.layers:
        if type(layer).__name__ not in KINDS:
            raise ModelError(f"rows of its {type(layer).__name__} cannot be selected")
        if is_recurrent(layer):
            layer.update_recurrent_state = functools.partial(_replace_state, layer)
    return cache


def is_recurrent(layer: Any) -> bool:
    """Whether a layer of a cache has a state that every further token changes."""
    return hasattr(layer, "recurrent_states")


def fewest_columns(cache: Any) -> int:
    """How many tokens at least are to be read behind a cached prompt where a gradient is wanted.

    A single token is written over a recurrent layer's state in place, and the gradient would need the old one.
    """
    return 2 if any(is_recurrent(layer) for layer in cache.layers) else 1


def select_rows(cache: Any, rows: Int[Tensor, " rows"]) -> None:
    """Keeps these rows, in this order; a row may come more than once."""
    for layer in cache.layers:
        for states, key in _tensors(layer):
            states[key] = states[key][rows]


def one_layer(cache: Any, index: int, rows: Int[Tensor, " rows"] | None = None) -> Any:
    """A cache that holds one layer's states alone, of some rows or all; writing to it leaves the original as it is."""
    taken = copy.copy(cache)
    taken.layers = [_copied(layer) if at == index else None for at, layer in enumerate(cache.layers)]
    for layer in taken.layers[index : index + 1] if rows is not None else ():
        for states, key in _tensors(layer):
            states[key] = states[key][rows]
    return taken


def drop_columns(cache: Any, count: int) -> None:
    """Forgets the first columns, which no row has a token in."""
    for layer in cache.layers:
        if _has_columns(layer):
            kept = min(layer.get_seq_length() - count, layer.keys.shape[-2])
            layer.keys, layer.values = layer.keys[..., -kept:, :], layer.values[..., -kept:, :]
            _set_length(layer, layer.get_seq_length() - count)


def append_rows(cache: Any, other: Any) -> None:
    """Adds the rows of another cache; the shorter ones move to the end, behind columns that the mask must hide.

    Distances between the tokens of a row stay as they are, and no model here counts anything else.
    """
    made = []
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for (states, key), (others, _) in zip(_tensors(mine), _tensors(theirs), strict=True):
            made.append((states, key, torch.cat(_of_one_length(states[key], others[key], key))))
    for states, key, joined in made:  # nothing is changed before all of it is known to fit
        states[key] = joined
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        if _has_columns(mine):
            _set_length(mine, max(mine.get_seq_length(), theirs.get_seq_length()))


def _copied(layer: Any) -> Any:
    """Layers replace their tensors, recurrent ones those in their dictionaries."""
    taken = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            setattr(taken, name, dict(value))
    if is_recurrent(layer):
        taken.update_recurrent_state = functools.partial(_replace_state, taken)
    return taken


def _of_one_length(one: Tensor, other: Tensor, key: Any) -> tuple[Tensor, Tensor]:
    if key not in ("keys", "values"):
        return one, other
    length = max(one.shape[-2], other.shape[-2])
    return pad(one, (0, 0, length - one.shape[-2], 0)), pad(other, (0, 0, length - other.shape[-2], 0))


def _tensors(layer: Any) -> Iterator[tuple[Any, Any]]:
    """Every tensor with one row a sequence that a layer holds, as a mapping and a key."""
    if _has_columns(layer):
        yield vars(layer), "keys"
        yield vars(layer), "values"
    if is_recurrent(layer):
        for states in (layer.conv_states, layer.recurrent_states):
            yield from ((states, key) for key, state in states.items() if state is not None)


def _has_columns(layer: Any) -> bool:
    return getattr(layer, "keys", None) is not None


def _set_length(layer: Any, length: int) -> None:
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def _replace_state(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
    """In place of transformers' own, which writes over the tensor that a gradient may need."""
    layer.is_recurrent_states_initialized[state_idx] = True
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states
