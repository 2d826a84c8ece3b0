"""Stop strings on vLLM: where answers end, what they say and how likely it was, as on transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import decoders

from experts.loading import load_frozen
from rollout.continuous import Decoding
from rollout.engine import Request, TransformersEngine
from rollout.types import Completion, FinishReason, Sampling
from rollout.vllm import VllmPolicyEngine
from tests.experts.test_stops import LLAMA, TOKENIZERS, naive
from tests.learner.world import World, router_config
from tests.models import by_pieces, make
from tests.vllm.conftest import ENGINE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # an engine takes minutes to start beside other tests
LIMIT = 24
PROMPTS = ([5, 9, 4], [7] * 30, [4, 4], [33], [60, 3], [20, 21, 22])
PIECES = {
    "byte level": (TOKENIZERS["byte level"][0], decoders.ByteLevel()),
    "byte fallback": (["▁Q", "Q", "▁", "▁▁", ":", "<0x0A>", "é", "aQ:b", "▁a"], decoders.Sequence(LLAMA)),
}


@pytest.fixture(scope="module", params=PIECES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A policy on vLLM whose tokens are odd."""
    folder: Path = tmp_path_factory.mktemp("policies") / "odd"
    make(folder, "llama", width=128, tokens=by_pieces(*PIECES[request.param]))
    made = World.of(folder, router_config(), **ENGINE)
    yield made
    made.worker.close()


def generate(engine: object, temperature: float, stop: Sequence[str]) -> list[Completion]:
    """Answers to the prompts, one after another."""
    assert isinstance(engine, TransformersEngine | VllmPolicyEngine)
    samples = 16 if temperature else 1
    sampling = Sampling(temperature=temperature, max_new_tokens=LIMIT, samples=samples, stop=tuple(stop))
    requests = [Request(np.array(tokens), None, row) for row, tokens in enumerate(PROMPTS)]
    return [completion for group in engine.generate(requests, None, sampling) for completion in group]


def stops_in(completions: Sequence[Completion]) -> list[str]:
    """Three pieces of what was said, so that some answers end at once, some later, and some never."""
    texts = [c.text for c in completions if len(c.text) > 10]
    return [texts[0][4:7], texts[-1][:2], texts[len(texts) // 2][8:10]]


def test_answers_end_where_those_of_transformers_do(world: World) -> None:
    theirs, ours = TransformersEngine(load_frozen(str(world.policy)), "front"), world.worker.engine
    stop = stops_in(generate(ours, 0.0, ()))
    pairs = list(zip(generate(ours, 0.0, stop), generate(theirs, 0.0, stop), strict=True))
    for mine, other in pairs:
        assert mine.tokens.tolist() == other.tokens.tolist()
        assert (mine.text, mine.finish) == (other.text, other.finish)
        assert np.abs(mine.logprobs - other.logprobs).max() < 1e-4
    assert len({(len(mine.tokens), mine.finish) for mine, _ in pairs}) > 2


def test_sampled_answers_end_where_their_text_says(world: World) -> None:
    engine = world.worker.engine
    tokenizer = world.worker.policy.tokenizer
    whole = generate(engine, 1.0, ())
    stop = [*stops_in(whole), "\n\n", "é", " Q"]
    lengths = set()
    for cut, full in zip(generate(engine, 1.0, stop), whole, strict=True):
        end = naive(tokenizer, full.tokens.tolist(), stop)
        assert cut.tokens.tolist() == full.tokens[:end].tolist()
        assert cut.finish is (full.finish if end is None else FinishReason.STOP)
        assert not any(text in cut.text for text in stop) and full.text.startswith(cut.text)
        lengths.add(end)
    assert None in lengths and 1 in lengths and len(lengths) > 5


def test_streams_end_there_too(world: World) -> None:
    engine = world.worker.engine
    stop = stops_in(generate(engine, 0.0, ()))
    wanted = generate(engine, 0.0, stop)

    async def said(tokens: Sequence[int]) -> tuple[list[int], FinishReason | None]:
        found, finish = list[int](), None
        how = Decoding(temperature=0.0, max_new_tokens=LIMIT, stop=tuple(stop))
        async for piece in engine.stream(np.array(tokens), None, how):
            found += piece.tokens
            finish = piece.finish
        return found, finish

    for tokens, completion in zip(PROMPTS, wanted, strict=True):
        assert asyncio.run(said(tokens)) == (completion.tokens.tolist(), completion.finish)
    assert engine.under_way == 0
