"""Every architecture works exactly, in a mixed batch and beyond its window, or is refused by name: as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.architectures import ARCHITECTURES, PROMPTS, SHARED, documented, make, policy_verdict, verdicts


def test_the_page_has_a_row_for_every_architecture() -> None:
    rows = documented()
    assert list(rows) == list(ARCHITECTURES)
    assert {len(row) for row in rows.values()} == {4}
    assert all(re.match(r"exact$|refused: |refused on CPUs: ", verdict) for row in rows.values() for verdict in row)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_what_the_page_says_of_it(name: str, tmp_path: Path) -> None:
    """`python -m tests.architectures` writes the page anew."""
    assert verdicts(name, tmp_path) == documented()[name][:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_long_prompts_change_nothing(name: str, tmp_path: Path) -> None:
    """Longer than the blocks (of 64 tokens) that recurrent layers are computed in, beside short ones."""
    path, draws = make(name, tmp_path), np.random.default_rng(0)
    long = [draws.integers(3, SHARED["vocab_size"], size=size).tolist() for size in (61, 130, 70, 3)]
    for prompts in (long, [long[1], *PROMPTS[1:]]):
        verdict = {policy_verdict(path, position, prompts) for position in ("front", "after_bos")}
        assert verdict == {documented()[name][0]}
