"""Continuous batching: sequences that come and go, each as if it were alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rollout.continuous import ContinuousBatch, Decoding, Piece, choose
from rollout.detokenizer import Detokenizer
from tests.models import tokenizer
from tests.rollout.test_engine import LIMIT, SLOTS, one_by_one, policy  # noqa: F401 - policy is a fixture

REQUESTS = [
    ([5, 9, 4], True, Decoding(temperature=1.0, samples=3, max_new_tokens=LIMIT, seed=1)),
    ([7, 3, 8, 6, 2, 11, 13, 12], False, Decoding(temperature=0.0, max_new_tokens=LIMIT)),
    ([4, 4], True, Decoding(temperature=0.7, samples=2, max_new_tokens=LIMIT, seed=2)),
    ([9, 9, 9, 9, 2], True, Decoding(temperature=0.0, max_new_tokens=2)),
    ([6], False, Decoding(temperature=1.3, samples=1, max_new_tokens=LIMIT, seed=3)),
]


async def said(batch: ContinuousBatch, tokens: Sequence[int], prefix: torch.Tensor | None, how: Decoding):
    """Tokens and log-probabilities of every sample."""
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in range(how.samples)]
    async for piece in batch.stream(tokens, prefix, how):
        found[piece.sample][0].extend(piece.tokens)
        found[piece.sample][1].extend(piece.logprobs)
    return found


async def under_way(batch: ContinuousBatch, count: int) -> None:
    """Waits until so many sequences are being decoded."""
    async with asyncio.timeout(20):
        while batch.under_way != count:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("limit", [64, 3])
def test_sequences_that_come_and_go_are_each_as_if_alone(policy, limit) -> None:  # noqa: F811
    prefixes = torch.randn(len(REQUESTS), SLOTS, policy.width, generator=torch.Generator().manual_seed(1)) * 0.3
    batch = ContinuousBatch(policy, "front", limit)

    async def everyone() -> list[list[tuple[list[int], list[float]]]]:
        asked = []
        for row, (tokens, with_prefix, how) in enumerate(REQUESTS):
            asked.append(asyncio.ensure_future(said(batch, tokens, prefixes[row] if with_prefix else None, how)))
            await asyncio.sleep(0.002 * row)  # they come at different moments; the outcome must not depend on which
        return await asyncio.gather(*asked)

    found = asyncio.run(everyone())
    batch.close()
    for row, (tokens, with_prefix, how) in enumerate(REQUESTS):
        for sample in range(how.samples):
            draws = np.random.default_rng([how.seed, sample]).random(LIMIT)
            wanted, logprobs = one_by_one(
                policy, tokens, prefixes[row] if with_prefix else None, 0, draws, how.temperature
            )
            wanted, logprobs = wanted[: how.max_new_tokens], logprobs[: how.max_new_tokens]
            assert found[row][sample][0] == wanted
            assert found[row][sample][1] == pytest.approx(logprobs, abs=1e-4)


def test_a_request_that_nobody_listens_to_any_more_is_ended(policy) -> None:  # noqa: F811
    endless = Decoding(temperature=1.0, samples=2, max_new_tokens=400)
    batch = ContinuousBatch(Unending(policy), "front")

    async def leave() -> list[Piece]:
        stream = batch.stream([5, 6], None, endless)
        first = [await anext(stream), await anext(stream)]
        other = asyncio.ensure_future(said(batch, [7, 8], None, Decoding(temperature=0.0, max_new_tokens=300)))
        await under_way(batch, 3)
        await stream.aclose()
        await under_way(batch, 1)
        ((tokens, _),) = await other
        assert len(tokens) == 300
        await under_way(batch, 0)
        return first

    assert {piece.sample for piece in asyncio.run(leave())} == {0, 1}
    batch.close()


class Unending:
    """The same policy, whose answers end at their length only."""

    end_tokens = ()

    def __init__(self, policy) -> None:  # noqa: F811
        self._policy = policy

    def __getattr__(self, name: str):
        return getattr(self._policy, name)


def test_what_fails_is_its_own_requests_failure(policy) -> None:  # noqa: F811
    batch = ContinuousBatch(policy, "front")

    async def both() -> None:
        # Together: they are read in one pass, until that fails.
        one = Decoding(max_new_tokens=1)
        empty, odd, fine = await asyncio.gather(
            said(batch, [], None, one),
            said(batch, [5], None, Decoding(max_new_tokens=1, seed=-1)),
            said(batch, [5], None, one),
            return_exceptions=True,
        )
        assert isinstance(empty, ValueError) and "empty prompt" in str(empty)
        assert isinstance(odd, ValueError) and not isinstance(fine, BaseException) and len(fine) == 1

    asyncio.run(both())
    batch.close()
    with pytest.raises(RuntimeError, match="closed"):
        asyncio.run(said(batch, [5], None, Decoding()))


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-39, 1.0), (1.0, 1e-46), (1.0, 0.0), (0.0, 0.0)])
def test_extremes_take_the_most_likely_token(temperature: float, top_p: float) -> None:
    chosen, logprob = choose(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), [temperature], [top_p], [0.99])
    assert chosen.item() == 0 and logprob.isfinite()


def test_top_p_samples_among_the_most_likely() -> None:
    chances = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    for draw, token in [(0.0, 0), (0.6, 0), (0.63, 1), (0.999, 1)]:
        chosen, logprob = choose(chances.log(), [1.0], [0.7], [draw])
        assert chosen.item() == token
        assert logprob.exp().item() == pytest.approx([0.625, 0.375][token], abs=1e-6)
    everything = [choose(chances.log(), [1.0], [1.0], [draw])[0].item() for draw in (0.49, 0.51, 0.81, 0.96)]
    assert everything == [0, 1, 2, 3]


def test_text_comes_in_whole_characters_and_is_the_whole_text() -> None:
    backend = tokenizer()
    text = "what is 3 + 4?\n"
    stream = Detokenizer(backend, (1,))
    pieces = [stream.add((token,)) for token in [*backend(text)["input_ids"], 1]]
    assert "".join(pieces) == text and pieces[0] == "w"


class Bytes:
    """A tokenizer of bytes."""

    @staticmethod
    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def test_half_a_character_waits_for_its_other_half() -> None:
    stream = Detokenizer(Bytes, ())
    wanted = "naïve 🦙 olé"
    pieces = [stream.add((token,)) for token in wanted.encode()]
    assert "".join(pieces) == wanted and "" in pieces
    cut = Detokenizer(Bytes, ())
    assert cut.add(tuple("é".encode()[:1])) == "" and cut.add((), last=True) == "\ufffd"
