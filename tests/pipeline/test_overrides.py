"""`key=value` behind a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ConfigError, load

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
