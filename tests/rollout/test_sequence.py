"""Laying out prefix, prompt and completion: positions count, and padding never shows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.loading import FrozenModel, load_frozen
from rollout.sequence import (
    CompletionBatch,
    PromptBatch,
    lay_out_completions,
    lay_out_prompts,
    with_prefix,
)
from tests.models import make

PAD = 0
position = st.sampled_from(["front", "after_bos"])
tokens = st.integers(3, 70)


@st.composite
def batches(draw, shortest: int = 2):
    """(prompts, completions, slots, position): prompts and completions of different lengths."""
    rows = draw(st.lists(st.lists(tokens, min_size=shortest, max_size=7), min_size=1, max_size=4))
    samples = draw(st.integers(1, 3))
    completion = st.lists(tokens, min_size=1, max_size=5)
    completions = [draw(st.lists(completion, min_size=samples, max_size=samples)) for _ in rows]
    return rows, completions, draw(st.integers(0, 3)), draw(position)


def seen(mask: Tensor, values: Tensor) -> list[int]:
    """What is left of a row without its masked columns."""
    return values[mask.bool()].tolist()


@given(batch=batches())
@settings(max_examples=80, deadline=None)
def test_positions_count_the_unmasked_tokens(batch):
    rows, completions, slots, where = batch
    prompts = lay_out_prompts(rows, slots, PAD, where)
    laid = lay_out_completions(prompts, completions, PAD)
    for row, prompt in enumerate(rows):
        assert seen(prompts.mask[row], prompts.positions[row]) == list(range(slots + len(prompt)))
    flat = [c for group in completions for c in group]
    for row, completion in enumerate(flat):
        start = slots + len(rows[row // len(completions[0])])
        assert seen(laid.valid[row], laid.positions[row]) == list(range(start, start + len(completion)))


@given(batch=batches())
@settings(max_examples=80, deadline=None)
def test_completions_stand_behind_their_own_prompt(batch):
    rows, completions, slots, where = batch
    prompts = lay_out_prompts(rows, slots, PAD, where)
    laid = lay_out_completions(prompts, completions, PAD)
    samples, total = len(completions[0]), prompts.mask.shape[1]
    for row, completion in enumerate(c for group in completions for c in group):
        assert torch.equal(laid.mask[row, :total], prompts.mask[row // samples])
        assert laid.mask[row, total:].tolist() == laid.valid[row].long().tolist()
        assert seen(laid.valid[row], laid.tokens[row]) == list(completion)
        assert laid.valid[row, : len(completion)].all()


@given(batch=batches())
@settings(max_examples=80, deadline=None)
def test_the_prefix_stands_where_it_was_asked_for(batch):
    """Marked embeddings, read without the masked columns: front, or behind the first token; never anything else."""
    rows, _, slots, where = batch
    prompts = lay_out_prompts(rows, slots, PAD, where)
    marks = -1.0 - torch.arange(slots, dtype=torch.float32).expand(len(rows), slots)[:, :, None]
    placed = with_prefix(prompts.tokens[:, :, None].float(), marks if slots else None, prompts)[:, :, 0]
    head = 1 if where == "after_bos" else 0
    for row, prompt in enumerate(rows):
        assert prompts.tokens[row][prompts.slot[row] >= 0].tolist() == [PAD] * slots
        wanted = [*prompt[:head], *(-1 - slot for slot in range(slots)), *prompt[head:]]
        assert seen(prompts.mask[row], placed[row]) == wanted


@given(batch=batches(), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_row_is_contiguous_and_the_slots_that_it_does_not_show_are_nowhere(batch, seed):
    rows, _, slots, where = batch
    shown = torch.from_numpy(np.random.default_rng(seed).random((len(rows), slots)) < 0.5)
    prompts = lay_out_prompts(rows, slots, PAD, where, shown)
    for row, prompt in enumerate(rows):
        length = len(prompt) + int(shown[row].sum())
        total = prompts.mask.shape[1]
        assert prompts.mask[row].tolist() == [0] * (total - length) + [1] * length
        assert prompts.positions[row].tolist() == [0] * (total - length) + list(range(length))
        assert prompts.slot[row][prompts.slot[row] >= 0].tolist() == shown[row].nonzero()[:, 0].tolist()
    assert prompts.mask[:, 0].any()


def test_a_hidden_slot_takes_no_column():
    prompts = lay_out_prompts([[5, 6], [7]], 2, PAD, slot_mask=torch.tensor([[False, True], [False, False]]))
    assert prompts.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prompts.slot.tolist() == [[1, -1, -1], [-1, -1, -1]]
    placed = with_prefix(prompts.tokens[:, :, None].float(), torch.full((2, 2, 1), -1.0), prompts)
    assert placed[:, :, 0].tolist() == [[-1, 5, 6], [PAD, PAD, 7]]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lay_out_prompts([[5], []], 1, PAD),
        lambda: lay_out_prompts([], 1, PAD),
        lambda: lay_out_completions(lay_out_prompts([[5], [6]], 1, PAD), [[[7]], [[7], [8]]], PAD),
        lambda: lay_out_completions(lay_out_prompts([[5]], 1, PAD), [[[]]], PAD),
        lambda: with_prefix(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), lay_out_prompts([[5]], 2, PAD)),
        lambda: with_prefix(torch.zeros(1, 3, 4), None, lay_out_prompts([[5]], 2, PAD)),
    ],
)
def test_what_cannot_be_laid_out_is_refused(wrong):
    with pytest.raises(ValueError):
        wrong()


@pytest.fixture(scope="module", params=["qwen2", "llama", "gpt_neox"])
def policy(request, tmp_path_factory) -> FrozenModel:
    """A tiny random policy of each family."""
    torch.set_num_threads(1)
    return load_frozen(str(make(tmp_path_factory.mktemp(request.param), request.param, seed=4)))


def logits(policy: FrozenModel, prompts: PromptBatch, laid: CompletionBatch, prefix: Tensor) -> list[Tensor]:
    """Each row's next-token logits from the prompt's last token on, without the masked columns."""
    samples = len(laid.tokens) // len(prompts.tokens)
    front = with_prefix(policy.embed(prompts.tokens), prefix if prompts.slots else None, prompts)
    both = torch.cat([front.repeat_interleave(samples, dim=0), policy.embed(laid.tokens)], dim=1)
    before = prompts.positions.repeat_interleave(samples, dim=0)
    with torch.no_grad():
        out = policy.model(
            inputs_embeds=both,
            attention_mask=laid.mask,
            position_ids=torch.cat([before, laid.positions], dim=1),
            use_cache=False,
        ).logits
    start = prompts.mask.shape[1] - 1
    return [row[start : start + 1 + n] for row, n in zip(out, laid.valid.sum(dim=1).tolist(), strict=True)]


def test_padding_never_shows(policy):
    """A batch gives the logits that each row gives alone, whatever stands beside it."""

    @given(batch=batches(shortest=2), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def check(batch, seed):
        rows, completions, slots, where = batch
        prefix = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(rows), slots, policy.width))).float()
        prompts = lay_out_prompts(rows, slots, policy.pad_id, where)
        together = logits(policy, prompts, lay_out_completions(prompts, completions, policy.pad_id), prefix)
        samples = len(completions[0])
        for row, found in enumerate(together):
            of = row // samples
            alone = lay_out_prompts([rows[of]], slots, policy.pad_id, where)
            laid = lay_out_completions(alone, [[completions[of][row % samples]]], policy.pad_id)
            (wanted,) = logits(policy, alone, laid, prefix[of : of + 1])
            assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max().clamp_min(1.0)

    check()


def test_a_prompt_of_one_token_is_refused_after_bos_where_nothing_would_stand_behind_the_prefix(policy):
    with pytest.raises(ValueError, match="at least two tokens"):
        lay_out_prompts([[5], [6, 7, 8]], 2, policy.pad_id, "after_bos")


def test_padding_does_not_show_behind_a_prompt_of_one_token(policy):
    where = "front"
    prefix = torch.randn(2, 2, policy.width, generator=torch.Generator().manual_seed(0))
    both = lay_out_prompts([[5], [6, 7, 8]], 2, policy.pad_id, where)
    together = logits(policy, both, lay_out_completions(both, [[[9, 10]], [[9]]], policy.pad_id), prefix)
    one = lay_out_prompts([[5]], 2, policy.pad_id, where)
    (alone,) = logits(policy, one, lay_out_completions(one, [[[9, 10]]], policy.pad_id), prefix[:1])
    torch.testing.assert_close(together[0], alone, rtol=1e-4, atol=1e-4)
