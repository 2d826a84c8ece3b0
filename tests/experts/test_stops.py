"""Stop strings, against decoding the whole answer after every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from experts.stops import StopStrings, cut_at_stop

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
# What a tokenizer's tokens are called, and how it writes them.
TOKENIZERS: dict[str, tuple[list[str], Any]] = {
    "byte level": (
        [
            "Q",
            ":",
            "Ċ",
            "ĊĊ",
            "ĊĊQ",
            "a",
            "ĠQ",
            "Ġ",
            "aQ:b",
            "Ã",
            "©",
            "ĊÃ",
            "©Q",
            "ðŁ",
            "¦",
            "Ļ",
            "<end>",
            "Ĳ",
            "<|x|>",
        ],
        decoders.ByteLevel(),
    ),
    "byte fallback": (
        ["a", "▁Q", "Q", "▁", "▁▁", ":", "<0x0A>", "<0x51>", "<0xC3>", "<0xA9>", "é", "<0xF0>", "<0x9F>", "aQ:b", "▁a"],
        decoders.Sequence(LLAMA),
    ),
    "metaspace": (["a", "▁Q", "Q", "▁", "▁▁", ":", "é", "aQ:b", "\n", "\n\n"], decoders.Metaspace()),
    "word piece": (["a", "Q", "##Q", ":", "##:", "##\n", ".", "##Qa"], decoders.WordPiece(cleanup=True)),
    "words with ends": (["a", "Q</w>", "Q", ":</w>", ":", "\n", "a</w>"], decoders.BPEDecoder(suffix="</w>")),
    "no decoder": (["a", "Q", ":", "\n"], None),
}
STOPS = st.text(st.sampled_from(" Q:\naé🦙."), min_size=1, max_size=4)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One whose vocabulary is these tokens."""
    vocabulary, decoder = TOKENIZERS[kind]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


MADE = {kind: tokenizer_of(kind) for kind in TOKENIZERS}


def naive(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> int | None:
    """Number of tokens up to the end."""
    for length in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:length])
        if any(stop in text for stop in stops):
            return length
    return None


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=150)
def test_an_answer_ends_where_its_whole_text_first_has_a_stop_string(kind: str, data: st.DataObject) -> None:
    tokenizer = MADE[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=24))
    stops = data.draw(st.lists(STOPS, min_size=1, max_size=3))
    assert StopStrings(tokenizer, stops).length(tokens) == naive(tokenizer, tokens, stops)


def named(kind: str, *tokens: str) -> list[int]:
    """Ids."""
    return [TOKENIZERS[kind][0].index(token) for token in tokens]


@pytest.mark.parametrize(
    ("kind", "tokens", "stops", "length", "text"),
    [
        ("byte level", ["a", "ĊĊQ", ":"], ["\n\n"], 2, "a"),  # in the middle of a token
        ("byte level", ["a", "Ċ", "Ċ", "Q", "a"], ["\n\nQ"], 4, "a"),  # over several
        ("byte level", ["ĊĊ", "a"], ["\n"], 1, ""),  # at once
        ("byte level", ["a", "ðŁ", "¦", "Ļ", "a"], ["🦙"], 4, "a"),  # a character in three
        ("byte level", ["a", *["ðŁ", "¦", "Ļ"] * 2], ["🦙🦙"], 7, "a"),
        ("byte level", ["a", "ĊÃ", "©", "a"], ["\n"], 2, "a"),  # behind it half a character
        ("byte level", ["a", "ĊÃ", "©Q"], ["\né"], 3, "a"),
        ("byte level", ["a", "aQ:b"], ["Q:b", "a", "Q:"], 1, ""),
        ("byte level", ["Q", "aQ:b"], ["aQ:b", "Q:"], 2, "Qa"),  # that which is complete first
        ("byte fallback", ["a", "<0x0A>", "<0x0A>", "Q"], ["\n\n"], 3, "a"),
        ("byte fallback", ["a", "<0x9F>", "<0x0A>", "<0x0A>", "Q"], ["\n\n"], None, "a\ufffd\ufffd\ufffdQ"),
        ("byte fallback", ["▁Q", ":"], [" Q"], None, "Q:"),  # the first space is no part of the text
        ("byte fallback", ["a", "▁Q", ":"], [" Q"], 2, "a"),
        # One byte that is no character makes none of those beside it.
        ("byte fallback", ["a", "<0x9F>", *["<0x51>"] * 5, "<0x0A>", "<0x0A>"], ["\n\n"], None, "a" + "\ufffd" * 8),
        ("metaspace", ["a", "▁▁", "a", "Q"], [" aQ"], 4, "a "),  # spaces at the front of what is decoded again
        ("words with ends", ["Q</w>", "a"], ["Q "], 2, ""),  # the space comes with the next token
        ("byte level", ["<end>", "<|x|>"], ["<|x"], 2, "<end>"),
    ],
)
def test_examples(kind: str, tokens: list[str], stops: list[str], length: int | None, text: str) -> None:
    tokenizer, ids = MADE[kind], named(kind, *tokens)
    assert StopStrings(tokenizer, stops).length(ids) == length == naive(tokenizer, ids, stops)
    assert cut_at_stop(tokenizer.decode(ids[:length]), stops) == text


def test_only_a_few_tokens_are_decoded_and_only_where_one_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = MADE["byte level"]
    stops = StopStrings(tokenizer, ["\n\nQ"])
    answer = named("byte level", *["a", "ĠQ", "Ċ", ":", "a", "Ċ"] * 100, "Ċ", "Q")
    assert stops.length(answer) == len(answer)
    decoded: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: decoded.append(len(tokens)) or decode(tokens))
    assert stops.length(answer) == len(answer)
    # The last token and what can hold the stop string with it: no other token ends one.
    assert len(decoded) == 1 and decoded[0] <= 6
