"""The self-check through real vLLM engines, which are asked about themselves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.config import CacheConfig, ExpertConfig
from experts.expert import Expert
from experts.loading import ModelError
from experts.state import embedding_rms
from rollout.config import PolicyConfig
from rollout.selfcheck import check_policy
from rollout.vllm import VllmPolicyEngine
from rollout.worker import RolloutWorker
from tests.learner.world import router_config
from tests.vllm.conftest import ENGINE

pytestmark = pytest.mark.slow


def test_a_policy_passes_and_one_whose_embeddings_are_scaled_twice_does_not(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(folders["llama"])
    worker = RolloutWorker(PolicyConfig(model=path, **ENGINE), path, router_config(), seed=0)
    try:
        assert {finding.name for finding in worker.self_check()} >= {"embeddings", "prefix", "batch", "gate"}
        inner = VllmPolicyEngine.embeddings

        def scaled(*arguments: object) -> list[torch.Tensor]:
            return [1.5 * row for row in inner(*arguments)]  # type: ignore[arg-type]

        monkeypatch.setattr(VllmPolicyEngine, "embeddings", scaled)
        # A norm in front hides a scale from all but the residual stream.
        failing = [f.name for f in check_policy(worker.engine, embedding_rms(worker.policy)) if not f.ok]
        assert failing[:1] == ["embeddings"]
    finally:
        worker.close()


def test_an_expert_passes_and_one_that_pools_the_first_token_is_refused(folders: dict[str, Path]) -> None:
    path = str(folders["qwen2"])
    Expert(ExpertConfig(name="one", model=path, **ENGINE), path, CacheConfig()).close()  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"two prompts: .* pool: last"):
        Expert(ExpertConfig(name="one", model=path, pool="first", **ENGINE), path, CacheConfig())  # type: ignore[arg-type]
