"""Experts' answers in the policy's prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experts.chat import Chat
from experts.config import TextConfig
from rollout.text import cut, unknown_fields, with_answers

SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is {a} + 1?"}


def test_names_answers_and_the_prompt_are_filled_in_once() -> None:
    template = "{b-2} and {a}; all: {answers}; {prompt} {c}"
    found = with_answers(template, [SYSTEM, ASKED], {"a": "3 {prompt}", "b-2": "4"})  # type: ignore[list-item]
    assert found[0] == SYSTEM
    assert found[1]["content"] == "4 and 3 {prompt}; all: a: 3 {prompt}\nb-2: 4; What is {a} + 1? {c}"
    assert found[1]["role"] == "user" and ASKED["content"] == "What is {a} + 1?"


def test_a_template_without_the_prompt_is_refused_and_unknown_names_are_found() -> None:
    with pytest.raises(ValueError, match="the policy would not see the question"):
        TextConfig(template="{answers}")
    assert unknown_fields("{one} {two} {answers} {prompt} {}", ["one"]) == ["two"]


def by_bytes() -> PreTrainedTokenizerFast:
    """One token a byte, so that a character may be cut in two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


BYTES = Chat(by_bytes())


@given(st.text(max_size=12), st.integers(1, 12))
def test_an_answer_is_cut_to_what_the_policy_counts(answer: str, tokens: int) -> None:
    kept = cut(answer, BYTES, tokens)
    assert len(kept.encode()) <= tokens
    if len(answer.encode()) <= tokens:
        assert kept == answer
    elif answer.isascii():
        assert kept == answer[:tokens]


def test_a_character_that_would_be_cut_in_two_is_left_out() -> None:
    assert cut("7€€", BYTES, 5) == "7€"  # two bytes of the last one would become a sign of three
