"""The policy on vLLM, against the learner's own log-probabilities and against transformers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from experts.loading import load_frozen
from experts.vllm_engine import EngineDiedError
from learner.logprobs import completion_logprobs
from rollout.continuous import Decoding, Piece
from rollout.engine import Request, TransformersEngine
from rollout.sequence import lay_out_completions, lay_out_prompts
from rollout.types import Completion, FinishReason, Sampling
from rollout.vllm import VllmPolicyEngine
from tests.learner.world import World, prompts, router_config, update
from tests.vllm.conftest import ENGINE, FAMILIES, engine_processes

TOLERANCE = 1e-4
SLOTS = 3


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[World]:
    """A rollout worker whose policy is on vLLM."""
    made = World.of(folders[request.param], router_config(), **ENGINE)
    yield made
    made.worker.close()


def engine_of(world: World) -> VllmPolicyEngine:
    """The worker's engine."""
    assert isinstance(world.worker.engine, VllmPolicyEngine)
    return world.worker.engine


def said(groups: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    """Every completion's tokens."""
    return [[completion.tokens.tolist() for completion in group] for group in groups]


def ask(world: World, prefix: torch.Tensor | None, temperature: float, seed: int = 1) -> list[list[Completion]]:
    """Answers to three prompts of different lengths."""
    requests = [Request(tokens, None, seed + row) for row, tokens in enumerate(([5, 9, 4], [7] * 30, [4, 4]))]
    sampling = Sampling(temperature=temperature, max_new_tokens=6, samples=16 if temperature else 1)
    return engine_of(world).generate(requests, prefix, sampling)


@pytest.mark.usefixtures("deepspeed_alone")
def test_the_whole_way_to_the_learner_agrees(world: World) -> None:
    learner = world.learner()
    for temperature in (0.7, 1.0, 1.3):
        sums = update(learner, world.scored(prompts(5), learner.snapshot(), temperature=temperature)).sums
        assert 0 < sums.mismatch_max < TOLERANCE


@pytest.mark.parametrize("position", ["front", "after_bos"])
def test_both_positions_of_the_prefix_agree(world: World, position: str) -> None:
    policy = load_frozen(str(world.policy))
    prefix = torch.randn(3, SLOTS, policy.width, generator=torch.Generator().manual_seed(1)) * 0.3
    tokens = ([5, 9, 4], [7] * 30, [4, 4])
    engine = engine_of(world)
    engine.position = position  # type: ignore[assignment]
    try:
        groups = ask(world, prefix, 0.7)
    finally:
        engine.position = "front"
    laid = lay_out_prompts(tokens, SLOTS, policy.pad_id, position)  # type: ignore[arg-type]
    completions = lay_out_completions(laid, [[c.tokens for c in group] for group in groups], policy.pad_id)
    with torch.no_grad():
        found = completion_logprobs(policy, laid, prefix, completions, 0.7).logprobs
    theirs = np.concatenate([c.logprobs for group in groups for c in group])
    assert np.abs(found[completions.valid].numpy() - theirs).max() < TOLERANCE


def test_greedy_answers_are_those_of_transformers(world: World) -> None:
    policy = load_frozen(str(world.policy))
    prefix = torch.randn(3, SLOTS, policy.width, generator=torch.Generator().manual_seed(2)) * 0.3
    requests = [Request(tokens, None) for tokens in ([5, 9, 4], [7] * 30, [4, 4])]
    sampling = Sampling(temperature=0.0, max_new_tokens=6, samples=1)
    theirs = TransformersEngine(policy, "front").generate(requests, prefix, sampling)
    ours = ask(world, prefix, 0.0)
    assert said(ours) == said(theirs)
    assert [[c.text for c in group] for group in ours] == [[c.text for c in group] for group in theirs]
    assert [[c.finish for c in group] for group in ours] == [[c.finish for c in group] for group in theirs]


async def streamed(world: World, tokens: list[int], prefix: torch.Tensor, how: Decoding) -> list[Piece]:
    """All pieces of one request."""
    return [piece async for piece in engine_of(world).stream(tokens, prefix, how)]


def test_streams_say_what_batches_say_and_samples_come_each_with_its_number(world: World) -> None:
    prefix = torch.randn(3, SLOTS, world.shape.policy_width, generator=torch.Generator().manual_seed(2)) * 0.3
    greedy = Decoding(temperature=0.0, max_new_tokens=6)
    asked = ([5, 9, 4], [7] * 30, [4, 4])

    async def everyone() -> list[list[Piece]]:
        return await asyncio.gather(*(streamed(world, t, p, greedy) for t, p in zip(asked, prefix, strict=True)))

    found = asyncio.run(everyone())
    for pieces, (whole,) in zip(found, ask(world, prefix, 0.0), strict=True):
        assert [t for piece in pieces for t in piece.tokens] == whole.tokens.tolist()
        assert [p for piece in pieces for p in piece.logprobs] == pytest.approx(whole.logprobs.tolist(), abs=TOLERANCE)
        assert [piece.finish for piece in pieces if piece.finish] == [whole.finish]
    several = Decoding(temperature=1.0, max_new_tokens=6, samples=4, seed=1)
    pieces = asyncio.run(streamed(world, [5, 9, 4], prefix[0], several))
    texts = [[t for piece in pieces if piece.sample == sample for t in piece.tokens] for sample in range(4)]
    assert all(texts) and len({tuple(text) for text in texts}) > 1


def test_who_leaves_a_stream_ends_the_engines_request(world: World) -> None:
    engine = engine_of(world)
    prefix = torch.zeros(SLOTS, world.shape.policy_width)
    how = Decoding(temperature=1.0, max_new_tokens=100, samples=8)

    async def leave() -> None:
        stream = engine.stream([5, 9, 4], prefix, how)
        await anext(stream)
        inside = engine.engine._engine.output_processor
        assert engine.under_way == 1 and inside.get_num_unfinished_requests() > 0
        before = engine.streamed
        await stream.aclose()
        async with asyncio.timeout(20):
            while inside.get_num_unfinished_requests():
                await asyncio.sleep(0.01)
        assert engine.under_way == 0 and engine.streamed - before < 8 * 100

    asyncio.run(leave())


def test_another_prefix_before_the_same_text_changes_the_answers_and_the_same_one_does_not(world: World) -> None:
    """With the prefix cache on: guards against a key that does not see embeddings (vLLM issue 56655)."""
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(3, SLOTS, world.shape.policy_width, generator=generator) * 0.5 for _ in range(2))
    first, again = ask(world, one, 0.0), ask(world, one, 0.0)
    assert said(first) == said(again)
    for group, twin in zip(first, again, strict=True):
        assert np.abs(group[0].logprobs - twin[0].logprobs).max() < TOLERANCE
    changed = ask(world, other, 0.0)
    assert any(
        abs(group[0].logprobs[0] - twin[0].logprobs[0]) > 0.01 for group, twin in zip(first, changed, strict=True)
    )
    without = ask(world, None, 0.0)
    pairs = zip(first, without, strict=True)
    assert any(abs(group[0].logprobs[0] - twin[0].logprobs[0]) > 0.01 for group, twin in pairs)


def test_the_seed_of_a_request_decides_and_samples_of_one_request_differ(world: World) -> None:
    prefix = torch.zeros(3, SLOTS, world.shape.policy_width)
    first, again, other = (said(ask(world, prefix, 1.0, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert all(len({tuple(tokens) for tokens in group}) > 1 for group in first)


def test_end_tokens_end_and_are_said(world: World) -> None:
    engine = engine_of(world)
    whole = engine.policy
    engine.policy = replace(whole, end_tokens=tuple(range(0, len(whole.tokenizer), 4)))
    try:
        completions = [c for group in ask(world, None, 1.0) for c in group]
    finally:
        engine.policy = whole
    for completion in completions:
        ended = completion.tokens[-1] % 4 == 0
        assert (completion.finish is FinishReason.STOP) == ended
        assert (completion.tokens[:-1] % 4 != 0).all()
        assert ended or len(completion.tokens) == 6
    assert {len(c.tokens) for c in completions} > {1, 2}


def test_weights_are_the_same_before_and_after(world: World) -> None:
    before = world.worker.sha256()
    ask(world, torch.ones(3, SLOTS, world.shape.policy_width), 1.0)
    assert world.worker.sha256() == before


def test_the_worker_knows_of_the_model_what_the_learner_needs(world: World) -> None:
    plain = World.of(world.policy).worker.info()
    mine = world.worker.info()
    for key in ("width", "parameters", "fingerprint", "embedding_rms"):
        assert mine[key] == plain[key], key


def test_calls_from_several_threads_are_batched_and_each_gets_its_own(world: World) -> None:
    prefix = torch.zeros(3, SLOTS, world.shape.policy_width)
    alone = [said(ask(world, prefix, 1.0, seed)) for seed in range(4)]
    found: dict[int, list[list[list[int]]]] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: said(ask(world, prefix, 1.0, s))})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [found[seed] for seed in range(4)] == alone


def test_an_engine_that_dies_is_noticed_within_seconds_and_answers_nothing_more(world: World) -> None:
    """The last test of this module: each family's engine ends here."""
    engine, noticed = engine_of(world).engine, threading.Event()
    engine._on_death = noticed.set
    for process in engine_processes():
        process.kill()
    assert noticed.wait(timeout=30)
    with pytest.raises(EngineDiedError, match="is gone"):
        ask(world, None, 0.0)
    engine.close()
    psutil.wait_procs(engine_processes(), timeout=30)
    assert not engine_processes()
