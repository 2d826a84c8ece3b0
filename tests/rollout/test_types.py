"""A rollout survives the wire unchanged, whatever its groups look like."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.types import (
    Completion,
    Draws,
    FinishReason,
    Group,
    Prompt,
    RewardStatus,
    Rollout,
    RouterStamp,
    Sampling,
    Score,
)


def same(one: object, other: object) -> bool:
    """Equality that looks into dataclasses and arrays, types included."""
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """A group with completions of any length, scored or not, with or without a prefix."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    count, slots, experts = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    lengths = [draw(st.integers(0, 4)) for _ in range(count)]
    return Group(
        prompt=Prompt(
            ordinal=draw(st.integers(0, 9)), task="t", messages=({"role": "user", "content": "x"},), answer="1",
            payload={"parts": [1, {"a": None}]},
        ),
        prompt_tokens=rng.integers(0, 9, draw(st.integers(0, 5))),
        completions=tuple(
            Completion(
                tokens=rng.integers(0, 9, n), logprobs=rng.random(n, dtype=np.float32), text=str(n),
                finish=draw(st.sampled_from(FinishReason)),
            )
            for n in lengths
        ),
        sampling=Sampling(temperature=0.7, max_new_tokens=4, samples=count),
        router=RouterStamp(version=3, incarnation=1, checksum="c"),
        draws=Draws(expert_mask=rng.random(experts) > 0.5),
        prefix_hash="h",
        prefix_sketch=rng.random(slots, dtype=np.float32),
        prefix_rms_ratio=0.5,
        feature_keys=("a",) * experts,
        attention=rng.random((slots, experts), dtype=np.float32),
        scores=tuple(
            Score(reward=float(n), status=draw(st.sampled_from(RewardStatus)), reason="why") for n in lengths
        ) if draw(st.booleans()) else (),
    )  # fmt: skip


@given(st.lists(groups(), max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_rollout_is_the_same_after_the_wire(made: list[Group]) -> None:
    rollout = Rollout(tuple(made), tokens=7, hits=1, misses=2, seconds=0.5, encode_s=0.1)
    buffers: list[pickle.PickleBuffer] = []
    wire = pickle.dumps(rollout, protocol=5, buffer_callback=buffers.append)
    assert same(pickle.loads(wire, buffers=buffers), rollout)
    assert len(buffers) <= 6, "every array of every completion travels by itself"
