"""Draws depend on names alone, and the collaborator always sees an expert."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.draws import collaborator_draws, generator, token_uniforms

numbers = st.integers(0, 2**31)


@given(seed=numbers, ordinal=numbers, version=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_uniforms_depend_on_their_names_only(seed, ordinal, version):
    """Neither what was drawn before, nor more samples, nor a longer limit changes a completion's draws."""
    first = token_uniforms(seed, ordinal, version, 3, 5)
    np.random.default_rng(seed).random(7)
    token_uniforms(seed, ordinal + 1, version, 2, 9)
    longer = token_uniforms(seed, ordinal, version, 5, 8)
    assert np.array_equal(longer[:3, :5], first)
    assert first.shape == (3, 5)
    assert ((first >= 0) & (first < 1)).all()


def test_every_name_has_its_own_draws():
    base = (1, 2, 3)
    names = [base, (2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 2, 3), (1, 22, 3)]
    rows = np.concatenate([token_uniforms(*name, 4, 6) for name in names])
    assert len(np.unique(rows.round(12))) == rows.size


def test_names_are_not_confused_by_gluing_them():
    assert generator(1, 23).random() != generator(12, 3).random()


@given(seed=numbers, ordinal=numbers, experts=st.integers(1, 6), dropout=st.floats(0, 1, exclude_max=True))
@settings(max_examples=100, deadline=None)
def test_at_least_one_expert_stays(seed, ordinal, experts, dropout):
    drawn = collaborator_draws(seed, ordinal, 0, experts, dropout).expert_mask
    assert drawn.shape == (experts,)
    assert drawn.dtype == bool
    assert drawn.any()
    assert np.array_equal(drawn, collaborator_draws(seed, ordinal, 0, experts, dropout).expert_mask)


def test_even_a_certain_dropout_leaves_each_expert_sometimes():
    masks = np.stack([collaborator_draws(0, n, 0, 3, 0.999).expert_mask for n in range(60)])
    assert (masks.sum(axis=1) >= 1).all()
    assert masks.any(axis=0).all()


def test_dropout_hides_about_its_share():
    masks = np.stack([collaborator_draws(0, n, 0, 4, 0.5).expert_mask for n in range(400)])
    assert 0.45 < 1 - masks.mean() < 0.55
    assert collaborator_draws(0, 1, 2, 4, 0.0).expert_mask.all()


def test_a_new_version_draws_again():
    assert len({collaborator_draws(0, 0, version, 5, 0.5).expert_mask.tobytes() for version in range(20)}) > 3
