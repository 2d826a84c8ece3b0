"""Runs and bundles read back, bundles written, and every way in which either can be wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from cluster.config import ConfigError, load
from cluster.run import bundle
from cluster.run.checkpoint import CheckpointError
from cluster.run.folder import RunFolderError
from cluster.run.trained import BUNDLE, TrainedError, check_belongs, open_trained, router_folder
from experts.standins import STAND_INS
from experts.state import RouterError, load_router
from tests.pipeline.runs import SHAPE, made_up_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of checkpoints 2 and 4."""
    return made_up_run(tmp_path / "runs")


def test_a_run_gives_its_last_checkpoint_or_the_one_asked_for(run: Path) -> None:
    last, early = open_trained(run), open_trained(str(run), 2)
    assert (last.name, last.step, early.step) == ("trio", 4, 2)
    assert last.snapshot.version == 4 and early.snapshot.version == 2
    assert last.snapshot.checksum != early.snapshot.checksum
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has steps \[2, 4\]"):
        open_trained(run, 3)


def test_a_bundle_is_the_run_it_was_made_of(run: Path, tmp_path: Path) -> None:
    out = bundle.export(run, tmp_path / "bundle")
    assert {path.name for path in out.iterdir()} == set(BUNDLE)
    was, now = open_trained(run), open_trained(out)
    assert now.snapshot.checksum == was.snapshot.checksum
    assert (now.name, now.step, now.meta["experts"]) == (was.name, 4, was.meta["experts"])
    same = ("run", "seed", "steps", "data", "experts", "policy", "router", "sampling", "algorithm", "learner")
    assert all(getattr(now.config, key) == getattr(was.config, key) for key in same)
    assert load_router(out, SHAPE, now.config.router).checksum == was.snapshot.checksum
    assert router_folder(str(out)) == out
    assert list(was.stand_ins) == ["one"] and np.array_equal(now.stand_ins["one"], was.stand_ins["one"])
    assert not open_trained(run, 2).stand_ins, "they were found for the last router"
    bundle.export(run, out, step=2, overwrite=True)
    assert not open_trained(out).stand_ins and not (out / STAND_INS).exists()
    with pytest.raises(TrainedError, match="holds one router: leave out the step"):
        open_trained(out, 4)


def test_a_bundle_says_nothing_of_the_machine(tmp_path: Path) -> None:
    start = tmp_path / "private"
    run = made_up_run(tmp_path / "home", router={"width": 16, "heads": 2, "latents": 3, "init": str(start)})
    out = bundle.export(run, tmp_path / "bundle")
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert b"secret-project" not in path.read_bytes(), path
    assert load(out / "recipe.yaml").root == "runs"
    assert "from a saved one" in (out / "README.md").read_text()
    assert open_trained(run).config.router.init is None, "it may be gone, and nothing needs it any more"


def test_results_are_those_of_the_exported_step(run: Path, tmp_path: Path) -> None:
    found = json.loads((bundle.export(run, tmp_path / "a") / "results.json").read_text())
    assert (found["step"], found["seed"], found["prompts"]) == (4, 5, {"digits": 4})
    cell = found["systems"]["router"]["digits"]
    assert cell["accuracy"] == 0.5 and 0 < cell["low"] < 0.5 < cell["high"] < 1
    assert found["systems"]["frozen_policy"]["mean"]["accuracy"] == found["untrained"]["digits"]["accuracy"] == 0.25
    assert found["versions"] == {"torch": "1.2.3"}
    early = bundle.export(run, tmp_path / "b", step=2)
    assert json.loads((early / "results.json").read_text())["systems"] is None
    assert "Step 2 was not measured" in (early / "README.md").read_text()


def test_the_card_says_what_it_belongs_to_and_how_it_is_used(run: Path, tmp_path: Path) -> None:
    text = (bundle.export(run, tmp_path / "bundle") / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["library_name"] == "n-musketeers" and "license" not in head
    assert head["base_model"] == ["org/one", "org/policy"], "the zoo is not on the hub"
    for expected in (
        "| expert `two` | `zoo/composed/two` | 10 | 2 | `print-two` |",
        "| policy | `org/policy` | 12 |  | `print-policy` |",
        "| router | 50.0 (15–85) | 50.0 (15–85) |",
        "| router before training | 25.0",
        "| expert one | 25.0",
        "4 updates by GRPO on digits",
        'musketeers generate DIR "..."',
        "musketeers serve DIR",
        "router.init=DIR",
        'Musketeers.from_run("DIR")',
    ):
        assert expected in body, expected


def test_other_models_are_refused(run: Path, tmp_path: Path) -> None:
    for place in (run, bundle.export(run, tmp_path / "bundle")):
        trained = open_trained(place)
        check_belongs(trained, SHAPE)
        for change, message in (
            ({"expert_fingerprints": ("print-one", "changed")}, "expert 'two' has another fingerprint"),
            ({"policy_fingerprint": "changed"}, "another policy: its fingerprint is print-policy"),
            ({"experts": ("two", "one")}, r"belongs to experts \['one', 'two'\], not"),
        ):
            with pytest.raises(RouterError, match=message):
                check_belongs(trained, replace(SHAPE, **change))


def test_what_is_in_the_way_is_not_written_over(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    bundle.export(run, out, step=2)
    (out / ".gitattributes").write_text("mine")
    with pytest.raises(bundle.BundleError, match=r"is not empty: give another folder, or .* --overwrite"):
        bundle.export(run, out)
    bundle.export(run, out, overwrite=True)
    assert open_trained(out).step == 4 and (out / ".gitattributes").read_text() == "mine"
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(bundle.BundleError, match="is no bundle"):
        bundle.export(run, other, overwrite=True)
    with pytest.raises(bundle.BundleError, match=r"thesis\.tex is a file"):
        bundle.export(run, other / "thesis.tex")
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    untrained = made_up_run(tmp_path / "other", steps=(), finished=False)
    for place, step, error, message in (
        (tmp_path, None, RunFolderError, "is no run's folder"),
        (untrained, None, CheckpointError, "holds no checkpoint"),
        (run, 3, CheckpointError, "no checkpoint of step 3"),
    ):
        with pytest.raises(error, match=message):
            bundle.export(place, out, step)
    with pytest.raises(bundle.BundleError, match="--private is for a repository"):
        list(bundle.share(run, out, None, False, None, private=True))
    with pytest.raises(ValueError, match=r"--push-to 'name' is not of the form USER/NAME"):
        list(bundle.share(run, out, None, False, "name", private=False))
    assert not out.exists()


@pytest.mark.parametrize("fails_at", ["card", "write_router"])
def test_an_interrupted_export_is_no_bundle(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    out = bundle.export(run, tmp_path / "bundle", step=2)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", str(out))

    monkeypatch.setattr(bundle, fails_at, full)
    with pytest.raises(bundle.BundleError, match="bundle cannot be written: No space left on device"):
        bundle.export(run, out, overwrite=True)
    with pytest.raises(RouterError, match=r"router\.json is missing"):
        open_trained(out)
    monkeypatch.undo()
    bundle.export(run, out, overwrite=True)
    assert open_trained(out).step == 4


@pytest.mark.parametrize("name", ["router.json", "router.safetensors", "recipe.yaml", "results.json"])
def test_a_damaged_bundle_is_refused_by_name(run: Path, tmp_path: Path, name: str) -> None:
    out = bundle.export(run, tmp_path / "bundle")
    (out / name).write_bytes(b"[1, " + (out / name).read_bytes()[:40])
    with pytest.raises(ValueError, match="bundle") as caught:
        open_trained(out)
    assert type(caught.value).__module__.split(".")[0] in ("cluster", "experts")


def test_what_holds_no_router_is_refused_with_the_key(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainedError, match="there is no folder '/nowhere'"):
        open_trained("/nowhere")
    with pytest.raises(TrainedError, match="is neither a run's folder"):
        open_trained(tmp_path)
    assert router_folder(str(run)) == run / "checkpoints" / "step-000004"
    for place in ("/nowhere", str(tmp_path), "hub:x", str(made_up_run(tmp_path / "new", (), finished=False))):
        with pytest.raises(ConfigError, match=r"^router\.init: .*(holds no router|not of the form|no checkpoint yet)"):
            router_folder(place)
