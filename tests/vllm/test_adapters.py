"""A trained adapter on vLLM, and prompts whose gate is closed: against the learner's own log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experts.adapter import LoraConfig, adapter_arrays
from experts.config import RouterConfig
from experts.state import RouterSnapshot
from learner.engine import OptimizerState, Rendezvous
from learner.learner import LearnerRank, LearnerState
from rollout.types import Sampling
from tests.learner.world import World, encode, prompts, router_config, update
from tests.vllm.conftest import ENGINE

pytestmark = pytest.mark.slow

LORA = {"rank": 4}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def world(folders: dict[str, Path]) -> Iterator[World]:
    """A rollout worker whose policy is on vLLM and takes adapters, behind a router with a gate."""
    config = RouterConfig.model_validate(router_config().model_dump() | {"gate": True})
    made = World.of(folders["qwen2"], config, lora=LORA, **ENGINE)
    yield made
    made.worker.close()


def moved(snapshot: RouterSnapshot, version: int, size: float = 0.03) -> RouterSnapshot:
    """Another version, whose adapter matters."""
    rng = np.random.default_rng(version)
    arrays = {n: (a + size * rng.standard_normal(a.shape)).astype(np.float32) for n, a in snapshot.arrays.items()}
    return RouterSnapshot.of(arrays, version, 0)


@pytest.mark.usefixtures("deepspeed_alone")
def test_each_group_is_sampled_under_its_own_version_s_adapter(world: World) -> None:
    spec = replace(world.spec(staleness=1, learner={"groups": 24}), lora=LoraConfig.model_validate(LORA))
    learner = LearnerRank(spec, Rendezvous())
    first = moved(learner.snapshot(), 0)
    second = moved(first, 1)
    learner.restore(LearnerState(second, OptimizerState(0, {}), {0: first, 1: second}, first.arrays), 0)
    some = prompts(24)
    parts = [world.scored(some[i::2], (first, second)[i]) for i in (0, 1)]
    groups = [group for part in parts for group in part.groups]
    assert {group.draws.open for group in groups} == {True, False}
    sums = update(learner, parts[0].with_groups(groups)).sums
    assert 0 < sums.mismatch_max < TOLERANCE
    assert sums.values["ratio"] != sums.values["tokens"]


def test_without_the_adapter_the_policy_is_the_frozen_one_and_its_weights_stay(world: World) -> None:
    plain = World.of(world.policy)
    sampling, some = Sampling(temperature=0.0, max_new_tokens=4, samples=1), prompts(4)
    from experts.loading import load_embeddings
    from experts.state import build_router, take_arrays

    policy = load_embeddings(str(world.policy), lora=LoraConfig.model_validate(LORA))
    arrays = take_arrays(build_router(world.router, world.shape, policy))
    assert adapter_arrays(arrays)
    before = world.worker.sha256()
    changed = moved(RouterSnapshot.of(arrays, 5, 0), 6, 0.1)
    with_it = world.worker.generate(some, sampling, changed, *encode(some), training=False).groups
    alone = world.worker.generate(some, sampling, changed, alone=True).groups
    theirs = plain.worker.generate(some, sampling, changed, alone=True).groups
    for mine, other, touched in zip(alone, theirs, with_it, strict=True):
        assert mine.completions[0].tokens.tolist() == other.completions[0].tokens.tolist()
        assert np.abs(mine.completions[0].logprobs - other.completions[0].logprobs).max() < TOLERANCE
        assert abs(touched.completions[0].logprobs[0] - mine.completions[0].logprobs[0]) > 1e-3
    assert world.worker.sha256() == before
