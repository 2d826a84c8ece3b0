"""`key=value` behind a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ConfigError, load
from cluster.run.preflight import check_names

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ADDED = "experts.2={name: third, model: here}"


def test_items_of_lists_are_changed_and_added_by_index() -> None:
    config = load(RECIPE, ["experts.1.model=there", ADDED, "experts.2.max_tokens=9"])
    assert [expert.model for expert in config.experts] == ["zoo/composed/chain_sum", "there", "here"]
    assert config.experts[2].max_tokens == 9
    assert load(RECIPE, ["data.tasks.0.config.max_terms=2"]).data.tasks[0].config["max_terms"] == 2


@pytest.mark.parametrize("override", ["experts.3={name: third, model: here}", "experts.2.model=here", "experts.9=1"])
def test_an_index_behind_the_end_is_refused_with_the_right_one(override: str) -> None:
    with pytest.raises(ConfigError, match=r"experts has 2 items, from 0; experts.2=\{...\} adds one"):
        load(RECIPE, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.learning_rate=abc", r"^override 'learner.learning_rate=abc': .*valid number.*, not 'abc'$"),
        ("policy.engine=vlm", r"^override 'policy.engine=vlm': .*'transformers' or 'vllm', not 'vlm'$"),
        ("router.knd=static", r"^override 'router.knd=static': unknown key 'router.knd': did you mean 'kind'\?$"),
    ],
)
def test_a_wrong_override_is_named_with_its_value(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(RECIPE, ["seed=1", override])


def test_what_the_recipe_itself_has_wrong_is_its_file_s(tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(RECIPE.read_text() + "seed: one\n")
    with pytest.raises(ConfigError, match=r"wrong.yaml: seed: .*, not 'one'"):
        load(tmp_path / "wrong.yaml", ["steps=3"])


def test_a_key_of_two_names_is_one(tmp_path: Path) -> None:
    (tmp_path / "saved.yaml").write_text(load(RECIPE).as_yaml())
    assert load(tmp_path / "saved.yaml", ["policy.replicas=2"]).policy.workers == 2
    assert load(RECIPE, ["policy.replicas=2"]).policy.workers == 2
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.read_text().replace("policy: {", "policy: {replicas: 2, "))
    assert load(other).policy.workers == 2
    for name in ("replicas", "workers"):
        assert load(other, [f"policy.{name}=3"]).policy.workers == 3
        with pytest.raises(ConfigError, match=r"^override 'policy\.workers=0'"):
            load(other, [f"policy.{name}=0"])
    other.write_text(RECIPE.read_text().replace("policy: {", "policy: {replicas: 2, workers: 3, "))
    with pytest.raises(ConfigError, match=r"unknown key 'policy\.replicas'"):
        load(other)


def test_a_kind_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"router.kind: 'perciever' is neither one of perceiver, .* nor of the form"):
        check_names(load(RECIPE, ["router.kind=perciever"]))
