from __future__ import annotations

from pathlib import Path

import pytest

from cluster.zoo import recipe as recipes
from cluster.zoo.build import build
from cluster.zoo.recipe import Recipe, load_recipe
from rewards.sources import Task, build_tasks

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return load_recipe(FOLDER / "tiny.yaml")


@pytest.fixture(scope="session")
def tasks(recipe: Recipe) -> dict[str, Task]:
    return build_tasks(recipe.data)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a zoo that holds the tiny world."""
    root = tmp_path_factory.mktemp("zoo")
    build(FOLDER / "tiny.yaml", root, progress=False)
    return root


@pytest.fixture
def tiny_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `tiny` one of the worlds that have a name."""
    monkeypatch.setattr(recipes, "RECIPES", FOLDER)
