"""The units of a prefix: measured on what the policy reads, not on what its files hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.config import CacheConfig, ExpertConfig
from experts.expert import Expert
from experts.loading import ModelError, describe, load_embeddings, load_frozen
from experts.state import embedding_rms
from tests.architectures import make


def test_the_size_of_embeddings_is_that_of_what_the_policy_reads(tmp_path: Path) -> None:
    """Gemma multiplies by the root of its width on the way in; a policy of vLLM, with embeddings alone, agrees."""
    path = make("gemma3", tmp_path)
    policy = load_frozen(path)
    weight = policy.model.get_input_embeddings().weight
    read = policy.embed(torch.arange(len(weight)))
    assert embedding_rms(policy) == pytest.approx(read.pow(2).mean().sqrt().item(), rel=1e-6)
    assert embedding_rms(policy) == pytest.approx(weight.shape[1] ** 0.5 * weight.pow(2).mean().sqrt().item(), rel=1e-3)
    assert embedding_rms(load_embeddings(path)) == embedding_rms(policy)


def test_a_prefix_is_as_wide_as_the_embeddings_and_a_router_reads_states_as_wide_as_they_are(tmp_path: Path) -> None:
    """OPT-350m: narrow embeddings, wide layers, narrow last states."""
    path = make("opt, narrow embeddings", tmp_path)
    assert load_frozen(path).width == load_embeddings(path).width == describe(path)["embedding_size"] == 16

    def width(layer: int) -> int:
        return Expert(ExpertConfig(name="e", model=path, layer=layer), path, CacheConfig()).info()["width"]

    assert (width(-1), width(1)) == (16, describe(path)["hidden_size"]) == (16, 32)


def test_a_layer_with_several_states_a_token_is_refused(tmp_path: Path) -> None:
    path = make("gemma3n", tmp_path)
    with pytest.raises(ModelError, match="layer 2 has several states a token"):
        Expert(ExpertConfig(name="e", model=path, layer=2), path, CacheConfig()).info()
