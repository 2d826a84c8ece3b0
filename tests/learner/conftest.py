"""Shared by the learner's tests: one policy on disk, one world around it, one DeepSpeed for the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from learner.engine import Rendezvous, init_ranks
from tests.learner.world import World
from tests.models import make

FAMILIES = ("qwen2", "llama", "gpt_neox")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine is shared, and one thread adds up in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random policy of each family."""
    folder = tmp_path_factory.mktemp("policies")
    return {family: make(folder / family, family, seed=index) for index, family in enumerate(FAMILIES)}


@pytest.fixture(scope="session")
def world(policies: dict[str, Path]) -> World:
    """The Qwen2 policy behind a front prefix."""
    return World.of(policies["qwen2"])


@pytest.fixture(scope="session")
def deepspeed_alone() -> None:
    """A world of one rank; a process can join only one."""
    init_ranks(Rendezvous())
