"""An expert's states from vLLM, against transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experts.config import CacheConfig, ExpertConfig
from experts.expert import Expert
from tests.vllm.conftest import ENGINE

# A family and a way of pooling each: an engine takes half a minute to start.
KINDS = [("qwen2", "last"), ("llama", "mean"), ("gpt_neox", "last_k")]
TEXTS = ["1 + 2 =", "a", "how many legs have 3 cats and a dog?", "x" * 100]


def expert(folder: Path, pool: str, **settings: object) -> Expert:
    """An expert of a saved model that reads up to 40 tokens."""
    values = {"name": "it", "model": str(folder), "pool": pool, "last_k": 5, "max_tokens": 40} | settings
    return Expert(ExpertConfig.model_validate(values), str(folder), CacheConfig(memory_mb=0), threads=1)


@pytest.mark.parametrize(("family", "pool"), KINDS)
def test_states_and_identity_are_those_of_transformers(folders: dict[str, Path], family: str, pool: str) -> None:
    messages = [({"role": "user", "content": text},) for text in TEXTS]
    plain = expert(folders[family], pool)
    fast = expert(folders[family], pool, **ENGINE)
    try:
        theirs, ours = plain.encode(messages), fast.encode(messages)
        for text, want, got in zip(TEXTS, theirs.features, ours.features, strict=True):
            assert got.shape == want.shape == (min(len(text), 5) if pool == "last_k" else 1, 128)
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
        assert plain.info()["fingerprint"] == fast.info()["fingerprint"]
        assert not set(theirs.keys) & set(ours.keys), "features of two engines share a key"
        assert fast.sha256() == fast.sha256()
    finally:
        fast.close()


@pytest.mark.slow
def test_its_own_answers_are_those_of_transformers_and_its_states_come_back_after(folders: dict[str, Path]) -> None:
    messages = [({"role": "user", "content": text},) for text in TEXTS]
    plain, fast = expert(folders["qwen2"], "last"), expert(folders["qwen2"], "last", **ENGINE)
    try:
        before, hashed = fast.encode(messages), fast.sha256()
        assert fast.answer(messages, 4) == plain.answer(messages, 4)
        after = fast.encode(messages)
        assert all(np.array_equal(x, y) for x, y in zip(before.features, after.features, strict=True))
        assert fast.sha256() == hashed
    finally:
        fast.close()
