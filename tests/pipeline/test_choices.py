"""When a router's choices learn, and what is said of a gate that has closed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.config import load, parse
from cluster.run.folder import RunFolder
from cluster.run.records import CLOSED_FOR, Records
from cluster.watch.live import PlainWatch
from tests.pipeline.runs import SHAPE

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
COLD = "router.warm_start.steps=0"


@pytest.mark.parametrize(
    ("overrides", "after"),
    [
        ((), 0),
        ((COLD,), 100),
        ((COLD, "steps=50"), 16),
        ((COLD, "router.init=runs/earlier"), 0),
        ((COLD, "router.gate=false"), 0),
        ((COLD, "router.kind=top1"), 0),
        ((COLD, "router.kind=top1", "router.gate=true"), 0),
        ((COLD, "router.kind=static"), 0),
        ((COLD, "algorithm.choice_after=7"), 7),
        ((COLD, "algorithm.choice_after=0"), 0),
        (("algorithm.choice_after=7",), 7),
    ],
)
def test_a_gate_learns_at_once_only_behind_a_prefix_that_was_taught(overrides: tuple[str, ...], after: int) -> None:
    config = load(RECIPE, overrides)
    assert config.algorithm.choice_after == after
    assert parse(yaml.safe_load(config.as_yaml()), "again") == config


def test_a_gate_that_has_closed_is_told_of_once(tmp_path: Path) -> None:
    config = load(RECIPE, (f"root={tmp_path}",))
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True)
    console = Console(record=True, width=500)
    records = Records(config, folder, PlainWatch(console), SHAPE)

    def told(closed: float, steps: int) -> int:
        for _ in range(steps):
            records.step({"step": 1, "router/closed_fraction": closed})
        return console.export_text().count("the gate has been closed for every prompt")

    assert told(1.0, CLOSED_FOR - 1) == 0
    assert told(0.9, 1) == 0
    assert told(1.0, 2 * CLOSED_FOR) == 1
