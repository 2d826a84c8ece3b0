"""A trained run's folder, without the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import parse
from cluster.run import checkpoint
from cluster.watch import logs
from experts.router import Perceiver
from experts.standins import write_stand_ins
from experts.state import RouterShape, RouterSnapshot, take_arrays
from learner.engine import OptimizerState
from learner.learner import LearnerState

SHAPE = RouterShape(("one", "two"), (6, 10), (-1, 2), ("print-one", "print-two"), 12, "print-policy", 0.5)
ROUTER = {"width": 16, "heads": 2, "latents": 3}


def settings(root: Path, **changes: Any) -> dict[str, Any]:
    """A recipe."""
    return {
        "run": "trio",
        "root": str(root),
        "steps": 4,
        "seed": 5,
        "data": {"tasks": [{"name": "digits", "plugin": "tests.plugins:Digits"}]},
        "experts": [{"name": "one", "model": "org/one"}, {"name": "two", "model": "zoo/composed/two", "layer": 2}],
        "policy": {"model": "org/policy"},
        "router": ROUTER,
        "tracking": {"wandb": "secret-project"},
        **changes,
    }


def made_up_run(
    root: Path,
    steps: tuple[int, ...] = (2, 4),
    finished: bool = True,
    driver: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run with a checkpoint of each step; a finished one was measured after the last."""
    config = parse(settings(root, **changes), "test")
    folder = root / config.run
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.as_yaml())
    for step in steps:
        router = Perceiver(config.router, SHAPE.widths, SHAPE.policy_width, SHAPE.embedding_rms)
        arrays = {name: array + np.float32(step) for name, array in take_arrays(router).items()}
        snapshot = RouterSnapshot.of(arrays, step, 0)
        learner = LearnerState(snapshot, OptimizerState(0, {"exp_avg": {}, "exp_avg_sq": {}}), {step: snapshot}, arrays)
        checkpoint.write(
            folder / "checkpoints", checkpoint.Checkpoint(step, learner, driver or {}), SHAPE, config.router, 3
        )
    if finished:
        result = {"tasks": {"digits": 0.5}, "mean": 0.5, "prompts": {"digits": 4}, "outcomes": {"digits": [1, 0, 1, 0]}}
        worse = {**result, "tasks": {"digits": 0.25}, "mean": 0.25, "outcomes": {"digits": [1, 0, 0, 0]}}
        lines = logs.JsonLines(folder / "eval.jsonl")
        lines.append({"step": 0, "kind": "before", "systems": {"router": worse}, "attention": {}})
        systems = {"router": result, "frozen_policy": worse, "experts/one": worse}
        lines.append({"step": steps[-1], "kind": "after", "systems": systems, "attention": {}})
        (folder / "summary.json").write_text(json.dumps({"versions": {"torch": "1.2.3"}}))
        write_stand_ins(folder, snapshot.checksum, {"one": np.ones((1, SHAPE.widths[0]), np.float32)})
    return folder
