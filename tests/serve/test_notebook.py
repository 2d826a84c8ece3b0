"""The notebook in docs/: it was executed, and its cells run as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "using-a-router.ipynb"


def cells() -> list[dict[str, Any]]:
    """Those with code."""
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_cell_was_executed_in_order_without_an_error() -> None:
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    kinds = {output["output_type"] for cell in cells() for output in cell["outputs"]}
    assert "display_data" in kinds and "error" not in kinds


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_its_cells_run_on_a_short_quickstart(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}

    def ran(*command: str, folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    recipe = str(ROOT / "configs" / "quickstart.yaml")
    short = ["steps=1", "execution=inline", "router.warm_start.steps=0", "evaluation.prompts=10"]
    ran("-m", "cluster.cli", "train", recipe, *short, f"root={tmp_path / 'runs'}", folder=tmp_path)
    (tmp_path / "docs").mkdir()
    script = tmp_path / "docs" / "notebook.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells()))
    ran(str(script), folder=tmp_path / "docs")
