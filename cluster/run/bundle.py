"""A trained router as a folder to share: weights, recipe, measured results and a model card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RunConfig
from cluster.run import hub
from cluster.run.card import card
from cluster.run.folder import RunFolder
from cluster.run.reporting import versions
from cluster.run.trained import BUNDLE, CARD, RECIPE, RESULTS, Trained, open_trained
from cluster.watch import logs
from cluster.watch.results import Result, interval
from experts.standins import STAND_INS, write_stand_ins
from experts.state import ROUTER_FILES, write_router

# Of the machine and the cluster that trained, and nobody else's business.
OF_THE_MACHINE = ("root", "threads", "cache", "checkpoint", "pipeline", "tracking", "ray")


class BundleError(ValueError):
    """A bundle that cannot be written there."""


def export(run: Path, out: Path, step: int | None = None, overwrite: bool = False) -> Path:
    """Writes a run's router as a bundle; `router.json`, without which it is none, comes last.

    step: which checkpoint; None takes the last.

    Raises:
        ValueError: one line, when there is no such run or checkpoint, or something is in the way.
    """
    RunFolder(run).saved_config()
    trained = open_trained(run, step)
    _check_place(out, overwrite)
    results = results_of(trained)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "router.json").unlink(missing_ok=True)
        (out / RECIPE).write_text(_recipe(trained.config), encoding="utf-8")
        (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (out / CARD).write_text(card(trained, results), encoding="utf-8")
        meta = {**trained.meta, "config": trained.config.router.model_dump(mode="json")}
        (out / STAND_INS).unlink(missing_ok=True)
        if trained.stand_ins:
            write_stand_ins(out, trained.snapshot.checksum, trained.stand_ins)
        write_router(out, trained.snapshot.arrays, meta)
    except OSError as error:
        raise BundleError(f"{error.filename or out} cannot be written: {error.strerror}") from error
    return out


def share(
    run: Path, out: Path, step: int | None, overwrite: bool, push_to: str | None, private: bool
) -> Iterator[str | Path]:
    """Exports, and uploads to the hub where that is asked for; says where the bundle is each time.

    Raises:
        ValueError: as `export`, and when the hub does not take it.
    """
    if push_to is not None:
        hub.check_name(push_to)
    elif private:
        raise BundleError("--private is for a repository on the hub: give --push-to USER/NAME too")
    yield export(run, out, step, overwrite)
    if push_to is not None:
        yield hub.push(out, push_to, private, BUNDLE)


def results_of(trained: Trained) -> dict[str, Any]:
    """What was measured of a run's router on held-out test prompts, after training or again with `musketeers eval`.

    Accuracies with 95 % intervals by system and column; None where this step was not measured.
    """
    run = RunFolder(trained.place)
    start = run.saved_config().router
    summary = json.loads(run.summary.read_text()) if run.summary.is_file() else {}
    lines = logs.read(run.eval) if run.eval.is_file() else []
    kinds = ("after", "again-test")
    measured = [line["systems"] for line in lines if line["step"] == trained.step and line["kind"] in kinds]
    before = [line["systems"]["router"] for line in lines if line["kind"] == "before"]
    systems = {name: _accuracies(result) for name, result in measured[-1].items()} if measured else None
    return {
        "run": trained.name,
        "step": trained.step,
        "seed": trained.config.seed,
        "from_saved_router": start.init is not None,
        "new_experts": list(start.add_expert),
        "prompts": measured[-1]["router"]["prompts"] if measured else None,
        "systems": systems,
        "untrained": _accuracies(before[0]) if before and measured else None,
        "versions": summary.get("versions") or versions(),
    }


def _accuracies(result: Result) -> dict[str, dict[str, float]]:
    found = {}
    for column, value in {**result["tasks"], "mean": result["mean"]}.items():
        spread = interval(result, column)
        found[column] = {"accuracy": value} | (
            {"low": max(spread[0], 0.0), "high": min(spread[1], 1.0)} if spread else {}
        )
    return found


def _recipe(config: RunConfig) -> str:
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in OF_THE_MACHINE}
    values["evaluation"].pop("cache")
    return "# The settings that the router beside this file was trained with.\n" + yaml.safe_dump(
        values, sort_keys=False
    )


def _check_place(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise BundleError(f"{out} is a file: give a folder for the bundle")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    if there and not overwrite:
        raise BundleError(f"{out} exists and is not empty: give another folder, or replace a bundle with --overwrite")
    if there and not there & {RECIPE, *ROUTER_FILES}:
        raise BundleError(f"{out} is no bundle (it has no {RECIPE}): not overwritten; give another folder")
