"""Collaborators trained by the same learner, and `musketeers compare` on their runs."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from cluster.run.trained import open_trained
from cluster.watch.ablation import STOOD_IN
from experts.standins import STAND_INS, read_stand_ins, write_stand_ins
from tests.e2e.conftest import Runs

pytestmark = pytest.mark.e2e


def compare(runs: Runs, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    return runs.start([sys.executable, "-m", "cluster.cli", "compare", *arguments])


def test_a_static_prefix_trains_and_is_compared_with_the_router(runs: Runs) -> None:
    printed = {}
    for kind in ("perceiver", "static"):
        done = runs.train(f"run={kind}", f"router.kind={kind}", "steps=3")
        assert done.returncode == 0, done.stdout + done.stderr
        printed[kind] = done.stdout
    static = runs.metrics("static")
    assert all(line["router/grad_norm"] > 0 for line in static)
    assert all(line["attention/digits/one"] == 0 for line in static)
    told = runs.summary("perceiver")["stand_ins"]
    assert set(told["without"]) == {"one", "two"} and set(told["whole"]) == {"digits", "mean"}
    assert (runs.folder / "runs" / "perceiver" / STAND_INS).is_file() and "An expert is away" in printed["perceiver"]
    assert "stand_ins" not in runs.summary("static"), "it listens to no expert"
    folders = [str(runs.folder / "runs" / kind) for kind in ("perceiver", "static")]
    said = compare(runs, *folders, "--out", str(runs.folder / "out"))
    assert said.returncode == 0, said.stderr
    assert "router.kind=perceiver" in said.stdout and "router.kind=static" in said.stdout
    arms = json.loads((runs.folder / "out" / "results.json").read_text())
    assert [arm["seeds"] for arm in arms] == [[0], [0]] and set(arms[1]["difference"]) == {"digits", "mean"}


@pytest.mark.slow
def test_a_run_is_ablated_and_measured_again(runs: Runs) -> None:
    done = runs.train("steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = runs.folder / "runs" / "run"
    command = [sys.executable, "-m", "cluster.cli"]
    router = open_trained(folder).snapshot.checksum
    # A random policy's experts are hardly missed: what was found, or not, is not what this is about.
    write_stand_ins(folder, router, {"two": np.ones((1, 32), np.float32)})
    said = runs.start([*command, "ablate", str(folder)])
    assert said.returncode == 0, said.stderr
    found = json.loads((folder / "ablation.json").read_text())
    after = runs.summary()["eval"]["router"]["tasks"]
    assert found["accuracy"] == after, "without an intervention it answers as it did"
    frozen = {(loss["what"], loss["expert"]) for loss in found["losses"]}
    assert (
        len(frozen) == 3 * 2 + 1 + 1
        and (STOOD_IN, "two") in frozen
        and (folder / "ablation.png").stat().st_size > 10_000
    )
    (folder / STAND_INS).unlink()
    said = runs.start([*command, "ablate", str(folder)])
    assert said.returncode == 0 and read_stand_ins(folder, router) is not None, "what a run lacks is looked for"
    again = runs.start([*command, "eval", str(folder), "--samples", "3"])
    assert again.returncode == 0 and "pass@2" in again.stdout, again.stderr
    line = json.loads((folder / "eval.jsonl").read_text().splitlines()[-1])
    assert line["kind"] == "again-test" and set(line["sampled"]) == {"1", "2"}
    assert line["systems"]["router"]["tasks"] == after


def test_a_run_that_has_not_finished_is_refused(runs: Runs) -> None:
    said = compare(runs, str(runs.folder / "runs" / "nowhere"))
    assert said.returncode == 2 and "is no run's folder" in " ".join(said.stderr.split())
