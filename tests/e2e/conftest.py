"""A run small enough for a test: random models of three families and a task they can learn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.models import make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy and two experts."""
    folder = tmp_path_factory.mktemp("models")
    make(folder / "policy", "qwen2", width=32)
    make(folder / "one", "llama", width=24, seed=1)
    make(folder / "two", "gpt_neox", width=32, seed=2)
    return folder


class Runs:
    """Starts the real command on a recipe in a folder."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(
            yaml.safe_dump(
                {
                    "run": "run",
                    "root": str(folder / "runs"),
                    "steps": 6,
                    "execution": "inline",
                    "threads": 1,
                    "max_staleness": 0,
                    "data": {"tasks": [{"name": "digits", "plugin": "tests.plugins:Digits"}]},
                    "experts": [{"name": n, "model": str(models / n), "max_tokens": 32} for n in ("one", "two")],
                    "policy": {"model": str(models / "policy")},
                    "router": {"width": 32, "heads": 4, "latents": 4},
                    "sampling": {"samples": 4, "max_new_tokens": 4},
                    "rewards": {"binary_at": None},
                    "learner": {"groups": 8, "learning_rate": 3e-3, "warmup_steps": 2},
                    "evaluation": {"prompts": 10, "validation_prompts": 5, "router_examples": 10, "cache": None},
                    "checkpoint": {"every": 2},
                }
            )
        )

    def command(self, *arguments: str) -> list[str]:
        """`musketeers train` on the recipe."""
        return [sys.executable, "-m", "cluster.cli", "train", str(self.recipe), *arguments]

    def environment(self) -> dict[str, str]:
        """Of a child process: it must find the plug-in, as a user's would on PYTHONPATH."""
        return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}

    def train(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs it to its end."""
        return self.start(self.command(*arguments))

    def start(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        return subprocess.run(
            command, capture_output=True, text=True, env=self.environment(), cwd=self.folder, timeout=280, check=False
        )

    def metrics(self, run: str = "run") -> list[dict[str, Any]]:
        """The lines of a run's metrics."""
        return [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]

    def summary(self, run: str = "run") -> dict[str, Any]:
        """A run's summary."""
        return json.loads((self.folder / "runs" / run / "summary.json").read_text())


@pytest.fixture
def runs(tmp_path: Path, models: Path) -> Runs:
    """A recipe in a folder of its own."""
    return Runs(tmp_path, models)
