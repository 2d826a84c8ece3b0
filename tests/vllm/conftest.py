"""Real vLLM engines, on its build for CPUs; one takes half a minute to start, so that tests of a module share one."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.learner.conftest import deepspeed_alone as deepspeed_alone
from tests.models import make
from tests.processes import descendants

FAMILIES = ("qwen2", "llama", "gpt_neox")
ENGINE = {"engine": "vllm", "max_model_tokens": 128, "kv_cache_gb": 0.125}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each family; vLLM's attention on CPU wants heads of 32."""
    folder = tmp_path_factory.mktemp("models")
    return {family: make(folder / family, family, width=128, seed=index) for index, family in enumerate(FAMILIES)}


def engine_processes() -> list[psutil.Process]:
    """vLLM's processes under this one."""
    return descendants(psutil.Process(), "vllm", "spawn_main")
