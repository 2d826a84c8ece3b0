"""Finished runs, read back for a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import RESUMABLE, flat, matches
from cluster.run.folder import RunFolder, RunFolderError
from cluster.watch import logs
from cluster.watch.comparison import Run

# Names and places, and what changes how fast a run is but not what it computes.
BESIDE_THE_POINT = ("run", "root", "seed", *(key for key in RESUMABLE if key not in ("steps", "evaluation")))


def read(folder: Path) -> Run:
    """A run with its last evaluation of held-out test prompts.

    Raises:
        RunFolderError: when it is no run, or has not finished.
    """
    run = RunFolder(folder)
    config = run.saved_config()
    after = [line for line in logs.read(run.eval) if line["kind"] == "after"]
    if not after or not run.summary.is_file():
        raise RunFolderError(f"{folder} has not finished: go on with it (--resume), or leave it out")
    summary = json.loads(run.summary.read_text())
    settings = flat(config.model_dump(mode="json"))
    kept: Mapping[str, Any] = {key: value for key, value in settings.items() if not matches(key, BESIDE_THE_POINT)}
    return Run(
        folder=folder,
        seed=config.seed,
        settings=kept,
        outcomes=after[-1]["systems"]["router"]["outcomes"],
        samples=int(summary["samples"]),
        train_s=float(summary["train_wall_s"]),
    )
