"""Trained collaborators, read back: from a run's folder, from a bundle, or from the Hugging Face hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import ConfigError, RunConfig, parse
from cluster.run import checkpoint, hub
from cluster.run.folder import RunFolder
from experts.standins import STAND_INS, States, read_stand_ins
from experts.state import ROUTER_FILES, RouterShape, RouterSnapshot, read_router, refuse_others

RECIPE, RESULTS, CARD = "recipe.yaml", "results.json", "README.md"
BUNDLE = (*ROUTER_FILES, STAND_INS, RECIPE, RESULTS, CARD)


class TrainedError(ValueError):
    """A place that holds no trained collaborator; the message says what is missing."""


@dataclass(frozen=True)
class Trained:
    """A trained collaborator and what it belongs to, from a run's folder or a bundle.

    place: the run's folder or the bundle; of a bundle on the hub, its copy on this machine.
    name: the run's.
    config: as it was trained, but without where its router started (`router.init`, `router.add_expert`), which
        may long be gone and counts for nothing afterwards.
    meta: `router.json`: the experts with widths, layers and fingerprints, and the policy.
    step: how many updates it had; None in a bundle that does not say.
    stand_ins: by expert, for when it is away; empty where none were looked for, or none helped.
    """

    place: Path
    name: str
    config: RunConfig
    snapshot: RouterSnapshot
    meta: dict[str, Any]
    step: int | None
    stand_ins: States


def open_trained(place: str | Path, step: int | None = None) -> Trained:
    """The collaborator of a run's folder, of a bundle, or of a bundle on the hub (`hub:USER/NAME[@REVISION]`).

    step: of a run, which checkpoint; None takes the last.

    Raises:
        ValueError: one line, when there is none, or it is damaged.
    """
    folder = hub.folder_of(place, BUNDLE)
    if (folder / RECIPE).is_file():
        if step is not None:
            raise TrainedError(f"{place} is a bundle, which holds one router: leave out the step, or give its run")
        return _of_bundle(folder)
    if (folder / "config.yaml").is_file():
        return _of_run(folder, step)
    if not folder.is_dir():
        raise TrainedError(f"there is no folder {str(folder)!r}: give a run's folder or a bundle's")
    raise TrainedError(f"{place} is neither a run's folder (with config.yaml) nor a bundle (with {RECIPE})")


def check_belongs(trained: Trained, shape: RouterShape) -> None:
    """Refuses models that are not those the collaborator was trained with.

    Raises:
        RouterError: naming what differs.
    """
    refuse_others(trained.place, trained.meta, shape)


def router_folder(place: str) -> Path:
    """Where the router of `router.init` lies: of a run's folder, in its last checkpoint.

    Raises:
        ConfigError: when there is none.
    """
    try:
        folder = hub.folder_of(place, BUNDLE)
        if (folder / "config.yaml").is_file():
            steps = checkpoint.steps(folder / "checkpoints")
            if not steps:
                raise TrainedError(f"the run {place} has no checkpoint yet")
            folder = checkpoint.place(folder / "checkpoints", steps[-1])
        if not (folder / "router.json").is_file():
            raise TrainedError(
                f"{place!r} holds no router.json: give a run's folder, a bundle, or a checkpoint's folder"
            )
    except (TrainedError, hub.HubError) as error:
        raise ConfigError(f"router.init: {error}") from error
    return folder


def saved_experts(folder: Path) -> list[str]:
    """Names of the experts that a saved router reads, in its order."""
    return [expert["name"] for expert in json.loads((folder / "router.json").read_text())["experts"]]


def _of_run(path: Path, step: int | None) -> Trained:
    run = RunFolder(path)
    config = run.saved_config()
    saved = checkpoint.read(run.checkpoints, step)
    snapshot, meta = read_router(checkpoint.place(run.checkpoints, saved.step))
    found = read_stand_ins(path, snapshot.checksum) or {}
    return Trained(path, config.run, _without_start(config), snapshot, meta, saved.step, found)


def _of_bundle(path: Path) -> Trained:
    snapshot, meta = read_router(path)
    recipe, results = path / RECIPE, path / RESULTS
    try:
        values = yaml.safe_load(recipe.read_text())
        step = json.loads(results.read_text())["step"] if results.is_file() else None
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise TrainedError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    config = parse(values, str(recipe))
    found = read_stand_ins(path, snapshot.checksum) or {}
    return Trained(path, config.run, _without_start(config), snapshot, meta, step, found)


def _without_start(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"router": config.router.model_copy(update={"init": None, "add_expert": ()})})
