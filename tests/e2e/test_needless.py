"""Experts that know nothing about a task do no harm with the defaults, and do without the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]  # the separable zoo may have to be built


def accuracies(folder: Path, *overrides: str) -> tuple[float, float]:
    """Of the trained system and of the policy alone, after the recipe's own steps."""
    recipe = str(ROOT / "configs" / "needless.yaml")
    command = [sys.executable, "-m", "cluster.cli", "train", recipe, "execution=inline", f"root={folder}", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads((folder / "needless" / "summary.json").read_text())["eval"]
    return measured["router"]["mean"], measured["frozen_policy"]["mean"]


def test_the_gate_keeps_out_what_nobody_needs(tmp_path: Path) -> None:
    router, alone = accuracies(tmp_path / "default")
    assert router >= alone - 0.02


def test_without_the_gate_the_same_experts_interfere(tmp_path: Path) -> None:
    router, alone = accuracies(tmp_path / "no-gate", "router.gate=false")
    assert router < alone - 0.1
