"""Runs whose folder is at a URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Runs

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_a_run_goes_on_from_its_url_on_another_machine(runs: Runs, tmp_path: Path, monkeypatch) -> None:
    there = tmp_path / "bucket" / "run"
    for machine, steps in (("first", 2), ("second", 4)):
        monkeypatch.setenv("MUSKETEERS_STAGING", str(tmp_path / machine))
        done = runs.train(f"root=file://{tmp_path}/bucket", f"steps={steps}", "--auto-resume")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len((there / "metrics.jsonl").read_text().splitlines()) == steps
        assert (there / "checkpoints" / f"step-{steps:06d}" / "manifest.json").is_file()
        assert (there / "summary.json").is_file()
    again = runs.train(f"root=file://{tmp_path}/bucket", "steps=4")
    assert again.returncode == 2 and "exists: continue it with --resume" in again.stderr
