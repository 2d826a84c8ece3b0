"""Small tasks that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rewards.config import DataConfig
from rewards.generation import one_generator
from rewards.sources import Task, build_tasks

SUMS: dict[str, Any] = {
    "name": "sums",
    "dataset": "chain_sum",
    "size": 3000,
    "config": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "answers": {"min": 0, "max": 12, "balance": 0.15},
}
LEGS: dict[str, Any] = {
    "name": "legs",
    "dataset": "leg_counting",
    "size": 3000,
    "weight": 2.0,
    "config": {"min_animals": 1, "max_animals": 2, "max_instances": 3},
    "answers": {"min": 0, "max": 12, "balance": 0.15},
}
BOTH: dict[str, Any] = {"name": "both", "compose": ["sums", "legs"], "size": 2000}


def data_of(*tasks: dict[str, Any], **settings: Any) -> DataConfig:
    """A `data` section with these tasks."""
    return DataConfig.model_validate({"tasks": list(tasks), **settings})


@pytest.fixture(scope="session", autouse=True)
def generator() -> Iterator[None]:
    """One generating process for all tests: each alone would start its own."""
    with one_generator():
        yield


@pytest.fixture(scope="session")
def data() -> DataConfig:
    """Two plain tasks and their composition, in an order that needs the parts first."""
    return data_of(BOTH, SUMS, LEGS)


@pytest.fixture(scope="session")
def tasks(data: DataConfig) -> dict[str, Task]:
    """The pools of `data`."""
    return build_tasks(data)
