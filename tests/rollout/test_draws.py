"""Draws depend on names alone, and the collaborator always sees an expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from rollout.continuous import choose
from rollout.draws import collaborator_draws, draw_tokens, generator, token_uniforms
from rollout.engine import pick
from tests.tensors import Allocations

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


LAST = 1 - 2.0**-53  # the largest draw there is


def distributions(rows: int, words: int, spread: float = 3.0, seed: int = 0) -> Tensor:
    """(rows, words) log-probabilities."""
    logits = torch.randn(rows, words, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.log_softmax(dim=-1)


def drawn(logprobs: Tensor, draws: list[float] | np.ndarray) -> np.ndarray:
    """One token a draw, all from the first row."""
    uniforms = torch.as_tensor(draws, dtype=torch.float64)
    return draw_tokens(logprobs, torch.zeros(len(uniforms), dtype=torch.long), uniforms).numpy()


@given(st.integers(1, 700), st.sampled_from([0.1, 3.0, 30.0]), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_draw_falls_on_the_token_where_the_cumulative_distribution_passes_it(words, spread, seed):
    logprobs = distributions(1, words, spread, seed)
    draws = np.concatenate([np.random.default_rng(seed).random(50), [0.0, LAST]])
    tokens = drawn(logprobs, draws)
    p = logprobs[0].double().exp().numpy()
    above = p.cumsum() / p.sum()
    assert (p[tokens] > 0).all()
    assert (above[tokens] > draws - 1e-6).all()
    assert (above[tokens] - p[tokens] / p.sum() < draws + 1e-6).all()


@pytest.mark.parametrize("words", [3, 72, 5000])
def test_tokens_come_as_often_as_their_probabilities_say(words):
    logprobs, count = distributions(1, words, 1.5), 200_000
    p = logprobs[0].double().exp().numpy()
    # Evenly spaced draws leave chance out: a token's count is its share to within one, and rounding.
    even = np.bincount(drawn(logprobs, (np.arange(count) + 0.5) / count), minlength=words)
    assert np.abs(even - count * p / p.sum()).max() < 1.5
    counts = np.bincount(drawn(logprobs, np.random.default_rng(5).random(count)), minlength=words)
    common = count * p > 5
    seen = np.append(counts[common], counts[~common].sum() + 1e-9)
    expected = np.append(count * p[common], count * p[~common].sum() + 1e-9)
    assert chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-3


def test_a_token_without_a_chance_is_never_drawn():
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, [300, 301, 640]] = torch.tensor([0.0, -3.0, 1.0])
    tokens = drawn(logits.log_softmax(dim=-1), [0.0, 1e-300, 0.2, 0.5, LAST])
    assert tokens[0] == tokens[1] == 300 and tokens[-1] == 640
    assert set(tokens) <= {300, 301, 640}
    # Draws are below 1, and one that was rounded up to it must not fall off the end.
    assert drawn(logits.log_softmax(dim=-1), [1.0])[0] == 640


@pytest.mark.parametrize("words", [72, 3001])
def test_draws_decide_whatever_shares_the_batch(words):
    logits = distributions(40, words)
    uniforms = torch.rand(90, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(90) % 40
    tokens, logprobs = pick(logits, rows, 0.8, uniforms)
    assert len(set(tokens.tolist())) > 20
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pick(logits, rows[order], 0.8, uniforms[order])[0], tokens[order])
    for sample in range(0, 90, 7):
        alone = pick(logits[rows[sample]][None], torch.zeros(1, dtype=torch.long), 0.8, uniforms[sample][None])
        assert alone[0] == tokens[sample] and alone[1] == logprobs[sample]


def test_greedy_takes_the_most_likely_and_needs_no_draw():
    logits = distributions(5, 300)
    tokens, logprobs = pick(logits, torch.tensor([4, 0, 0]), 0.0, None)
    assert torch.equal(tokens, logits.argmax(dim=-1)[[4, 0, 0]])
    torch.testing.assert_close(logprobs, logits.max(dim=-1).values[[4, 0, 0]])


def test_no_float64_tensor_is_as_large_as_the_logits():
    """Nor is anything as large as samples x vocabulary."""
    logits, samples = distributions(4, 10_000), 40
    uniforms = torch.rand(samples, dtype=torch.float64)
    for draw in (
        lambda: pick(logits, torch.arange(samples) % 4, 1.0, uniforms),
        lambda: choose(logits, [1.0] * 4, [1.0] * 4, uniforms[:4].tolist()),
    ):
        with Allocations(torch.float64) as doubles:
            draw()
        assert 0 < doubles.largest <= samples * 101
        with Allocations() as everything:
            draw()
        assert everything.largest <= 4 * 100 * 101
