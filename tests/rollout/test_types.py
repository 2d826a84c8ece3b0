"""A rollout survives the wire unchanged, whatever its groups look like."""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
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
        sampling=Sampling(temperature=0.7, max_new_tokens=4, samples=count, stop=("Q:",) * draw(st.integers(0, 2))),
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


def rollout_of(made: list[Group]) -> Rollout:
    """With some costs."""
    return Rollout(tuple(made), tokens=7, hits=1, misses=2, seconds=0.5, encode_s=0.1)


def sent(rollout: Rollout) -> Rollout:
    """After the wire."""
    return pickle.loads(pickle.dumps(rollout))


def costs(rollout: Rollout) -> tuple[float, ...]:
    """What it cost to make."""
    return rollout.tokens, rollout.hits, rollout.misses, rollout.seconds, rollout.encode_s


@given(st.lists(groups(), max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_rollout_is_the_same_after_the_wire(made: list[Group]) -> None:
    rollout = rollout_of(made)
    buffers: list[pickle.PickleBuffer] = []
    wire = pickle.dumps(rollout, protocol=5, buffer_callback=buffers.append)
    there = pickle.loads(wire, buffers=buffers)
    for found in (there, sent(there), sent(sent(rollout))):
        assert same(found.groups, rollout.groups) and costs(found) == costs(rollout)
    assert len(buffers) <= 6, "every array of every completion travels by itself"


@given(st.lists(groups(), max_size=4))
@settings(max_examples=100, deadline=None)
def test_what_came_over_the_wire_is_read_and_scored_without_unpacking_as_objects_are(made: list[Group]) -> None:
    rollout = rollout_of(made)
    there = sent(rollout)
    assert there.answers() == [(g.prompt, [c.text for c in g.completions]) for g in made] == rollout.answers()
    assert same(tuple(there.facts()), tuple(rollout.facts()))
    scores = [[Score(reward=i + g.ordinal, reason=c.text) for i, c in enumerate(g.completions)] for g in made]
    judged = there.scored(scores)
    assert there._groups is None and judged._groups is None, "unpacked on the way"
    assert same(sent(judged).groups, rollout.scored(scores).groups) and costs(judged) == costs(rollout)
    assert same(there.groups, rollout.groups), "scoring changed what was there"


def test_a_wrong_number_of_scores_is_refused_on_both_sides_of_the_wire() -> None:
    completion = Completion(
        tokens=np.zeros(1, np.int64), logprobs=np.zeros(1, np.float32), text="", finish=FinishReason.STOP
    )
    group = Group(
        prompt=Prompt(ordinal=5, task="t", messages=(), answer=""), prompt_tokens=np.zeros(1, np.int64),
        completions=(completion, completion), sampling=Sampling(temperature=1.0, max_new_tokens=1, samples=2),
        router=RouterStamp(version=0, incarnation=0, checksum=""), draws=Draws(expert_mask=np.ones(1, bool)),
        prefix_hash="", prefix_sketch=np.zeros(0, np.float32), prefix_rms_ratio=0.0, feature_keys=(),
        attention=np.zeros((0, 0), np.float32),
    )  # fmt: skip
    for rollout in (rollout_of([group]), sent(rollout_of([group]))):
        with pytest.raises(ValueError, match="prompt 5: 1 scores for 2 completions"):
            rollout.scored([[Score(reward=1.0)]])
