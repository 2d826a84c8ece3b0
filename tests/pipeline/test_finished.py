"""What a comparison reads of a finished run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import load
from cluster.keys import changed_keys
from cluster.run import finished
from cluster.run.folder import RunFolder, RunFolderError
from cluster.watch.comparison import labels

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
START = {"time/start_s": 20.0, "operations/experts": 1.0, "operations/experts_cold": 2.0, "operations/learner": 4.0}
STEP = {
    "operations/experts": 10.0,
    "operations/experts_cold": 20.0,
    "operations/rollout": 40.0,
    "operations/learner": 80.0,
}


def ran(root: Path, *missing: str) -> Path:
    """A run of three held-out prompts and two steps, without some of its files."""
    run = RunFolder.of(load(RECIPE, (f"root={root}", "run=it")))
    run.path.mkdir(parents=True)

    def evaluated(kind: str, *outcomes: int) -> dict[str, Any]:
        return {"kind": kind, "prompts": "hash", "systems": {"router": {"outcomes": {"composed": list(outcomes)}}}}

    evaluations = [evaluated("before", 0, 1, 0), evaluated("after", 1, 1, 0)]
    texts = {
        "config.yaml": yaml.safe_dump(run_config(root)),
        "eval.jsonl": "".join(json.dumps(line) + "\n" for line in evaluations),
        "metrics.jsonl": "".join(json.dumps({"step": step, **STEP}) + "\n" for step in (1, 2)),
        "summary.json": json.dumps({"samples": 64, "train_wall_s": 100.0, "frozen": []}),
        "start.json": json.dumps(START),
        "data.json": json.dumps({"seed": 1, "tasks": {"composed": {"turns": 1, "pools": "digest"}}}),
    }
    for name, text in texts.items():
        if name not in missing:
            (run.path / name).write_text(text)
    return run.path


def run_config(root: Path) -> dict[str, Any]:
    """As a run writes it."""
    return load(RECIPE, (f"root={root}", "run=it")).model_dump(mode="json")


def test_a_run_costs_what_its_start_and_its_steps_did(tmp_path: Path) -> None:
    run = finished.read(ran(tmp_path))
    assert (run.outcomes, run.samples, run.train_s) == ({"composed": [1, 1, 0]}, 64, 120.0)
    assert (run.operations, run.operations_cold) == (5 + 2 * 130, 6 + 2 * 140)


def test_without_the_costs_of_the_start_those_of_the_run_are_not_known(tmp_path: Path) -> None:
    run = finished.read(ran(tmp_path, "start.json"))
    assert (run.train_s, run.operations, run.operations_cold) == (100.0, 0.0, 0.0)


def test_its_prompts_digests_are_read_and_a_run_of_before_has_none(tmp_path: Path) -> None:
    assert finished.read(ran(tmp_path / "now")).pools == {"composed": "digest"}
    assert finished.read(ran(tmp_path / "before", "data.json")).pools == {}


def test_before_the_first_update_there_is_what_the_start_has_made(tmp_path: Path) -> None:
    run = finished.unrewarded(ran(tmp_path), "started")
    assert (run.name, run.outcomes, run.samples, run.prompts) == ("started", {"composed": [0, 1, 0]}, 0, "hash")
    assert (run.train_s, run.operations, run.operations_cold, run.constant) == (20.0, 5.0, 6.0, False)


def test_a_run_that_has_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="has not finished"):
        finished.read(ran(tmp_path, "summary.json"))


def test_what_follows_from_other_settings_is_no_setting_of_an_arm(tmp_path: Path) -> None:
    plain = finished.read(ran(tmp_path))
    assert plain.settings["router.gate"] == plain.settings["algorithm.choice_after"] == "default"
    chosen = replace(plain, settings={**plain.settings, "router.gate": False})
    static = replace(plain, settings={**plain.settings, "router.kind": "static"})
    assert labels([plain, chosen]) == ["router.gate=default", "router.gate=False"]
    assert labels([plain, static]) == ["router.kind=perceiver", "router.kind=static"]


def test_a_run_from_before_a_setting_is_read_as_what_it_was(tmp_path: Path) -> None:
    config = run_config(tmp_path) | {"steps": 300}
    config["router"]["warm_start"]["steps"] = 0
    folder = RunFolder(ran(tmp_path))
    for given, read in ((100, 100), (None, 0)):
        config["algorithm"]["choice_after"] = given
        if given is None:
            del config["algorithm"]["choice_after"]
        folder.config.write_text(yaml.safe_dump(config))
        assert folder.saved_config().algorithm.choice_after == read


def test_a_run_may_be_made_longer_but_not_be_measured_on_other_prompts() -> None:
    fresh = "router.warm_start.steps=0"
    run = load(RECIPE, (fresh,))
    assert run.algorithm.choice_after == 100
    assert changed_keys(run, load(RECIPE, (fresh, "steps=600", "evaluation.every=10", "learner.ranks=2"))) == []
    assert changed_keys(run, load(RECIPE, (fresh, "algorithm.choice_after=7"))) == ["algorithm.choice_after"]
    other = load(RECIPE, (fresh, "evaluation.prompts=7", "evaluation.seed=1"))
    assert changed_keys(run, other) == ["evaluation.prompts", "evaluation.seed"]
