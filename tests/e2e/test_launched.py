"""Runs of a sweep as processes of this machine."""

from __future__ import annotations

import json
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest

from cluster.run.launched import Launched
from tests.e2e.conftest import Runs
from tests.jobs.nodes import wait_for

pytestmark = pytest.mark.e2e


def test_a_run_is_of_this_code_wherever_it_starts_and_says_why_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").write_text("raise SystemExit('another project')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUSKETEERS_SEEN", "yes")
    launched = Launched(Path("missing.yaml"), ["seed=1"], tmp_path / "runs" / "a.log")
    launched.wait(120)
    assert launched.over and not launched.succeeded
    assert "missing.yaml" in launched.said and "another project" not in launched.log.read_text()
    assert "PYTHONSAFEPATH" not in os.environ, "what the server needs is its own affair"


@pytest.mark.slow
def test_a_run_outlives_the_process_that_forked_it_and_can_still_be_stopped(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in runs.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(runs.folder)
    metrics = runs.folder / "runs" / "long" / "metrics.jsonl"
    launched = Launched(runs.recipe, ["run=long", "steps=100000"], runs.folder / "long.log")
    wait_for("its first steps", lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2, 120)
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    before = len(metrics.read_text().splitlines())
    wait_for("more steps", lambda: len(metrics.read_text().splitlines()) > before, 60)
    assert not launched.over
    launched.stop()
    launched.wait(120)
    assert launched.over
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert (metrics.parent / "checkpoints" / f"step-{steps[-1]:06}" / "manifest.json").is_file()
