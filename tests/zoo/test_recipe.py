from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.zoo import recipe as recipes
from cluster.zoo.paths import worlds_named_by
from cluster.zoo.recipe import Recipe, ZooError, load_recipe, worlds
from tests.zoo.conftest import FOLDER


def changed(tmp_path: Path, edit: str, by: str) -> Path:
    text = (FOLDER / "tiny.yaml").read_text()
    assert edit in text
    (tmp_path / "changed.yaml").write_text(text.replace(edit, by))
    return tmp_path / "changed.yaml"


def test_the_packaged_worlds_load_and_hold_out_the_runs_shares() -> None:
    assert set(worlds()) >= {"composed", "separable"}
    for world in worlds():
        recipe = load_recipe(world)
        assert recipe.world == world
        assert (recipe.seed, recipe.data.seed) == (0, 1)
        assert (recipe.data.validation, recipe.data.test) == (0.1, 0.15)


@pytest.mark.parametrize(
    ("edit", "by"),
    [
        ("steps: 2, batch: 8", "steps: 4, batch: 8"),
        ("world: tiny", "world: tiny\nseed: 1"),
        ("size: 300", "size: 301"),
        ("layout: operands", "layout: operands, shown: 0.75, none: 0.0"),
    ],
)
def test_a_fingerprint_changes_with_the_recipe(recipe: Recipe, tmp_path: Path, edit: str, by: str) -> None:
    assert load_recipe(changed(tmp_path, edit, by)).fingerprint != recipe.fingerprint


def test_a_seed_after_the_name_makes_another_world_of_the_same_recipe() -> None:
    first, same, other = (load_recipe(world) for world in ("composed", "composed@0", "composed@1"))
    assert same == first and same.folder == first.folder
    assert other.seed == 1 and other.folder != first.folder and other.folder.startswith("composed-")
    assert other.model_dump(exclude={"seed"}) == first.model_dump(exclude={"seed"})
    assert worlds_named_by(["zoo/composed@1/policy", "zoo/composed/policy", "org/model"]) == {"composed", "composed@1"}


@pytest.mark.parametrize("name", ["composed@", "composed@x", "composed@-1", "composed@1@2", "compossed@1"])
def test_a_seed_that_is_none_is_refused_by_name(name: str) -> None:
    with pytest.raises(ZooError, match=f"zoo/{name}/policy'.*(after the @ stands a seed|no zoo world 'compossed')"):
        worlds_named_by([f"zoo/{name}/policy"])
    with pytest.raises(ZooError, match=r"after the @ stands a seed|no zoo world"):
        load_recipe(name)


def test_a_fingerprint_ignores_how_the_recipe_is_written(recipe: Recipe, tmp_path: Path) -> None:
    document = yaml.safe_load((FOLDER / "tiny.yaml").read_text()) | {"seed": 0}
    (tmp_path / "same.yaml").write_text("# a comment\n" + yaml.safe_dump(document))
    assert load_recipe(tmp_path / "same.yaml").fingerprint == recipe.fingerprint


def test_a_fingerprint_changes_with_the_zoos_format(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "ZOO_FORMAT", recipes.ZOO_FORMAT + 1)
    assert load_recipe(FOLDER / "tiny.yaml").fingerprint != recipe.fingerprint


@pytest.mark.parametrize(
    ("edit", "by", "message"),
    [
        ("world: tiny", "world: tiny\nsteps: 3", "steps"),
        ("both: 0.5, plus: 0.5", "both: 0.5, twice: 0.5", "expert 'plus': mixture names 'twice'"),
        ("both: 0.5, plus: 0.25", "both: 0.5, minus: 0.25", "mixture names 'minus'"),
        ("name: twice\n    task", "name: plus\n    task", "share a name"),
        ("layout: operands", "layout: operands, shown: 0.9", "not 1"),
        ("width: 16, layers: 2, heads: 2, kv_heads: 1", "width: 16, layers: 2, heads: 3, kv_heads: 1", "do not divide"),
        ("world: tiny", "world: [", "no YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(tmp_path: Path, edit: str, by: str, message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        load_recipe(changed(tmp_path, edit, by))
    assert "\n" not in str(caught.value)


def test_an_unknown_world_names_the_known_ones() -> None:
    with pytest.raises(ZooError, match="composed"):
        load_recipe("compsed")
