"""Checkpoints: the learner's full state in safetensors, the driver's in JSON, a manifest written last.

A folder without a manifest is no checkpoint; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from cluster.run import groups
from experts.config import RouterConfig
from experts.state import RouterShape, RouterSnapshot, save_router
from learner.engine import OptimizerState
from learner.learner import LearnerState
from rollout.sequence import LAYOUT
from rollout.types import Group, Prompt

FINISHED = "finished.jsonl.gz"


class CheckpointError(ValueError):
    """A checkpoint that is missing or damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    driver: the admission's state, the stream's, elapsed seconds and samples.
    finished: scored groups that wait for their update.
    layout: of the sequences that it was trained on.
    """

    step: int
    learner: LearnerState
    driver: dict[str, Any]
    finished: Sequence[Group] = ()
    layout: int = LAYOUT


def write(root: Path, checkpoint: Checkpoint, shape: RouterShape, router: RouterConfig, keep: int) -> Path:
    """Writes `step-NNNNNN` and drops the oldest beyond `keep`; the first (step 0) always stays, for replay."""
    folder, partial = place(root, checkpoint.step), root / f".partial-{checkpoint.step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    save_router(partial, checkpoint.learner.snapshot, shape, router)
    arrays, meta = _flatten(checkpoint.learner)
    (partial / "learner.safetensors").write_bytes(save(arrays))
    (partial / "learner.json").write_text(json.dumps(meta, indent=2) + "\n")
    (partial / "driver.json").write_text(json.dumps(checkpoint.driver) + "\n")
    groups.write_file(partial / FINISHED, checkpoint.finished)
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    manifest = {"step": checkpoint.step, "layout": checkpoint.layout, "files": files}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    for old in steps(root)[1:-keep] if steps(root)[:1] == [0] else steps(root)[:-keep]:
        shutil.rmtree(place(root, old))
    return folder


def place(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step-{step:06d}"


def steps(root: Path) -> list[int]:
    """Steps that have a whole checkpoint, in order."""
    found = (re.fullmatch(r"step-(\d{6,})", path.parent.name) for path in root.glob("step-*/manifest.json"))
    return sorted(int(match[1]) for match in found if match)


def read(root: Path, step: int | None = None, prompt: Callable[[int, int | None], Prompt] | None = None) -> Checkpoint:
    """The checkpoint of a step, or the last one.

    Args:
        prompt: makes the prompt of an ordinal and a level (the run's stream); without it finished groups are left out.

    Raises:
        CheckpointError: when there is none, or a file does not match its manifest.
    """
    known = steps(root)
    if not known or (step is not None and step not in known):
        raise CheckpointError(
            f"{root} holds no checkpoint{'' if step is None else f' of step {step}'}; it has steps {known}"
        )
    folder = place(root, known[-1] if step is None else step)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} is missing or damaged: delete {folder} to go on from the one before"
            )
    meta = json.loads((folder / "learner.json").read_text())
    learner = _unflatten(load_file(folder / "learner.safetensors"), meta)
    finished = groups.read_file(folder / FINISHED, prompt) if prompt else []
    driver = json.loads((folder / "driver.json").read_text())
    return Checkpoint(manifest["step"], learner, driver, finished, manifest.get("layout", 1))


def read_to_train(root: Path, step: int | None = None) -> Checkpoint:
    """As `read`, for a run that goes on or is replayed.

    Raises:
        CheckpointError: also when the run's sequences were laid out otherwise: it would go on under another policy.
    """
    saved = read(root, step)
    if saved.layout != LAYOUT:
        raise CheckpointError(
            f"{root.parent} was trained by a version that laid out prefix and prompt otherwise (layout {saved.layout}, "
            f"this version's is {LAYOUT}): it cannot be resumed or replayed: start anew, or use that version"
        )
    return saved


def _flatten(state: LearnerState) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays = {f"initial/{name}": array for name, array in state.initial.items()}
    arrays |= {f"moments/{k}/{n}": a for k, named in state.optimizer.moments.items() for n, a in named.items()}
    arrays |= {f"history/{v}/{n}": a for v, snapshot in state.history.items() for n, a in snapshot.arrays.items()}
    versions = {str(v): [s.version, s.incarnation, s.checksum] for v, s in state.history.items()}
    return arrays, {"version": state.snapshot.version, "optimizer_steps": state.optimizer.steps, "history": versions}


def _unflatten(arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> LearnerState:
    def under(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

    history = {
        int(v): RouterSnapshot(version, incarnation, checksum, under(f"history/{v}/"))
        for v, (version, incarnation, checksum) in meta["history"].items()
    }
    moments = {key: under(f"moments/{key}/") for key in ("exp_avg", "exp_avg_sq")}
    optimizer = OptimizerState(meta["optimizer_steps"], moments)
    return LearnerState(history[meta["version"]], optimizer, history, under("initial/"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
