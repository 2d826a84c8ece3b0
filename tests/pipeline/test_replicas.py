"""Which copy of an expert gets which prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.run.fleet import Fleet, Inline
from cluster.run.replicas import Replicas, home
from experts.expert import Encoded, whole
from rollout.types import Prompt


def prompt(number: int) -> Prompt:
    """One of many."""
    return Prompt(ordinal=number, task="t", messages=({"role": "user", "content": f"say {number}"},), answer="")


@dataclass
class Copy:
    """An expert's worker that says which texts it was given."""

    name: str = "it"

    def encode(self, messages: list[Any], rows: list[int], keep: bool = True) -> Encoded:
        """The texts as keys, and their numbers as features."""
        texts = [message[0]["content"] for message in messages]
        features = tuple(np.full((1, 2), float(text.split()[1]), np.float32) for text in texts)
        return Encoded(self.name, tuple(texts), features, 1, 2, 0.5, tuple(rows))


def handles(count: int, name: str = "it") -> list[Inline]:
    """So many copies."""
    return [Inline(f"Expert({name}, replica {i})", Copy(name)) for i in range(count)]


def test_a_prompt_goes_to_the_same_copy_whatever_comes_with_it() -> None:
    def where(numbers: list[int]) -> dict[int, str]:
        copies = Replicas(handles(3))
        split = copies.split([prompt(n) for n in numbers], lambda reference: True)
        return {numbers[row]: handle.name for handle, rows in split for row in rows}

    all_of_them = where(list(range(60)))
    assert len(set(all_of_them.values())) == 3
    for some in ([5, 3, 58], [7], list(range(59, 30, -1))):
        assert where(some) == {n: all_of_them[n] for n in some}


def test_the_least_loaded_copy_gets_what_is_too_much_for_the_one_at_home() -> None:
    copies = Replicas(handles(2), spill=4)
    mine = [prompt(n) for n in range(200) if home(prompt(n).key, 2) == 0][:20]
    ended: set[str] = set()

    def rows_of(place: int, prompts: list[Prompt]) -> list[int]:
        split = {handle.name: rows for handle, rows in copies.split(prompts, lambda made: made in ended)}
        return split.get(copies.handles[place].name, [])

    assert rows_of(0, mine[:4]) == [0, 1, 2, 3]
    copies.sent(copies.handles[0], "first", 4)
    assert rows_of(1, mine[4:6]) == [0]  # one more would make it five against none
    ended.add("first")
    assert rows_of(1, mine[4:8]) == []


@given(st.integers(1, 4), st.lists(st.integers(0, 99), unique=True, min_size=1, max_size=40), st.integers(1, 5))
def test_the_parts_of_all_copies_are_one_whole_in_the_prompts_order(count: int, numbers: list[int], spill: int) -> None:
    one, two = handles(count, "one"), handles(1, "two")
    fleet = Fleet([*one, *two], [], [], [], 1.0, copies=[Replicas(one, spill), Replicas(two)])
    parts = [stage.reference for stage in fleet.encode([prompt(n) for n in numbers])]
    found = whole(parts)
    assert [part.expert for part in found] == ["one", "two"]
    for part in found:
        assert [int(feature[0, 0]) for feature in part.features] == numbers
        assert list(part.keys) == [f"say {n}" for n in numbers]
        assert part.rows == tuple(range(len(numbers)))


def test_a_part_that_is_missing_is_refused() -> None:
    part = Copy().encode([prompt(1).messages, prompt(2).messages], [0, 2])
    with pytest.raises(ValueError, match="the parts of its copies are not one whole"):
        whole([part])
