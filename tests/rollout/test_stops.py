"""Answers that end at a stop string: what the engine and the server's streams make of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import decoders

from experts.loading import FrozenModel, load_frozen
from rollout.config import SamplingConfig
from rollout.continuous import ContinuousBatch, Decoding
from rollout.detokenizer import Detokenizer, Stops
from rollout.draws import token_uniforms
from rollout.engine import Request, TransformersEngine
from rollout.types import Completion, FinishReason, Sampling
from tests.experts.test_stops import MADE, TOKENIZERS, naive
from tests.models import by_pieces, make

PROMPTS = ([5, 9, 4], [7, 3, 8, 6, 2], [4, 4])
LIMIT, SAMPLES = 10, 24
STOP = ("\n\n", "aQ", "é", "Q:", "ab")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    """A random policy with odd tokens, which ends at one token in sixteen."""
    tokens = by_pieces(TOKENIZERS["byte level"][0], decoders.ByteLevel())
    folder = make(tmp_path_factory.mktemp("policies") / "odd", "llama", tokens=tokens)
    frozen = load_frozen(str(folder), "float32", "cpu", "policy")
    return replace(frozen, end_tokens=tuple(range(25, len(frozen.tokenizer), 4)))


def generate(policy: FrozenModel, temperature: float, stop: tuple[str, ...], limit: int = LIMIT) -> list[Completion]:
    """Samples of all prompts, with the same draws whatever else."""
    draws = [token_uniforms(3, ordinal, 0, SAMPLES, LIMIT)[:, :limit] for ordinal in range(len(PROMPTS))]
    requests = [Request(np.array(tokens), mine) for tokens, mine in zip(PROMPTS, draws, strict=True)]
    sampling = Sampling(temperature=temperature, max_new_tokens=limit, samples=SAMPLES, stop=stop)
    return [c for group in TransformersEngine(policy, "front").generate(requests, None, sampling) for c in group]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_an_answer_is_that_without_stop_strings_up_to_the_token_that_completes_one(
    policy: FrozenModel, temperature: float
) -> None:
    whole = generate(policy, temperature, ())
    stop = (*STOP, max((c.text for c in whole), key=len)[2:5])
    ends = set()
    for cut, full in zip(generate(policy, temperature, stop), whole, strict=True):
        said = full.tokens[:-1] if full.finish is FinishReason.STOP else full.tokens
        end = naive(policy.tokenizer, said.tolist(), stop)
        assert cut.tokens.tolist() == full.tokens[:end].tolist()
        assert cut.logprobs == pytest.approx(full.logprobs[:end], abs=1e-5)
        assert cut.finish is (full.finish if end is None else FinishReason.STOP)
        if end is not None:
            text = policy.tokenizer.decode(cut.tokens)
            assert cut.text == min((text.partition(s)[0] for s in stop if s in text), key=len)
        else:
            assert cut.text == full.text
        ends.add(end)
    assert len(ends) > 5 * temperature and ends != {None}
    if temperature == 1.0:
        assert {None, 1, 2} <= ends


def test_a_stop_string_that_the_last_allowed_token_completes_ends_the_answer(policy: FrozenModel) -> None:
    ended = [c for c in generate(policy, 1.0, STOP) if c.tokens[-1] not in policy.end_tokens]
    lengths = {len(c.tokens) for c in ended if c.finish is FinishReason.STOP}
    for limit in sorted(lengths):
        again = generate(policy, 1.0, STOP, limit)
        assert any(len(c.tokens) == limit and c.finish is FinishReason.STOP for c in again)
        assert all(c.finish is FinishReason.STOP or len(c.tokens) == limit for c in again)
    assert len(lengths) > 3


def test_samples_that_have_ended_cost_nothing_more(policy: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = policy.model.forward
    monkeypatch.setattr(
        policy.model, "forward", lambda *a, **k: rows.append(len(k["attention_mask"])) or forward(*a, **k)
    )
    lengths = [len(group.tokens) for group in generate(policy, 0.0, STOP)[::SAMPLES]]
    assert rows == [len(PROMPTS)] + [n for step in range(1, LIMIT) if (n := sum(length > step for length in lengths))]


def test_without_stop_strings_nothing_is_decoded_on_the_way(
    policy: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[object] = []
    decode = type(policy.tokenizer)._decode
    monkeypatch.setattr(
        type(policy.tokenizer), "_decode", lambda *a, **k: decoded.append(k) or decode(*a, **k), raising=True
    )
    made = generate(policy, 1.0, ())
    assert len(decoded) == len({id(c) for c in made})


def test_streams_end_there_and_their_pieces_are_the_text(policy: FrozenModel) -> None:
    how = Decoding(temperature=1.0, max_new_tokens=LIMIT, samples=SAMPLES, seed=5)
    batch = ContinuousBatch(policy, "front")

    async def said(how: Decoding) -> list[tuple[list[int], FinishReason | None, str]]:
        tokens, finishes = [list[int]() for _ in range(SAMPLES)], [None] * SAMPLES
        texts = [""] * SAMPLES
        readers = [(Detokenizer(policy.tokenizer, policy.end_tokens), Stops(how.stop)) for _ in range(SAMPLES)]
        async for piece in batch.stream(np.array(PROMPTS[0]), None, how):
            assert finishes[piece.sample] is None
            tokens[piece.sample] += piece.tokens
            finishes[piece.sample] = piece.finish
            characters, stops = readers[piece.sample]
            last = piece.finish is not None
            texts[piece.sample] += stops.add(characters.add(piece.tokens, last), last)[0]
        return list(zip(tokens, finishes, texts, strict=True))

    ends = set()
    whole, cut = asyncio.run(said(how)), asyncio.run(said(replace(how, stop=STOP)))
    batch.close()
    for (tokens, finish, text), (full, other, _) in zip(cut, whole, strict=True):
        end = naive(policy.tokenizer, full[:-1] if full[-1] in policy.end_tokens else full, STOP)
        assert tokens == full[:end] and finish is (other if end is None else FinishReason.STOP)
        shown = tokens[:-1] if tokens[-1] in policy.end_tokens else tokens
        written = policy.tokenizer.decode(shown)
        assert text == min([written, *(written.partition(s)[0] for s in STOP if s in written)], key=len)
        ends.add(end)
    assert len(ends) > 3 and None in ends


def test_what_cannot_be_a_stop_string_is_refused() -> None:
    assert SamplingConfig.model_validate({"stop": ["\n\nQ", " "]}).stop == ("\n\nQ", " ")
    for wrong, why in [([""], "must not be empty"), (["a"] * 17, "at most 16"), ("a", "valid tuple"), ([1], "string")]:
        with pytest.raises(ValidationError, match=why):
            SamplingConfig.model_validate({"stop": wrong})


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=60)
def test_the_pieces_of_a_stream_are_the_whole_text(kind: str, data: st.DataObject) -> None:
    """Also the space that some tokenizers leave out in front of the first word; bytes that are no characters aside."""
    tokens = [at for at, name in enumerate(TOKENIZERS[kind][0]) if name not in ("<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>")]
    said = data.draw(st.lists(st.sampled_from(tokens), max_size=12))
    stream = Detokenizer(MADE[kind], ())
    pieces = [stream.add((token,)) for token in said]
    assert "".join([*pieces, stream.add((), last=True)]) == MADE[kind].decode(said)
