"""Finished runs, read back for a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.keys import RESUMABLE, flat, matches
from cluster.run.folder import RunFolder, RunFolderError
from cluster.watch import logs
from cluster.watch.comparison import Run
from cluster.watch.results import ROUTER, SHUFFLED_WITHIN_TASK, label
from experts.config import EngineConfig

# Names and places, and what changes how fast a run is but not what it computes.
BESIDE_THE_POINT = ("run", "root", "seed", "data.date", *(key for key in RESUMABLE if key != "steps"))
BY_ITSELF = "default"  # the value of a setting that follows from others


def read(folder: Path, name: str | None = None) -> Run:
    """A run with its last evaluation of held-out test prompts.

    name: of its arm; None lets the settings in which runs differ tell.

    Raises:
        RunFolderError: when it is no run, or has not finished.
    """
    run = RunFolder(folder)
    config = run.saved_config()
    after = _last(run, "after")
    summary = json.loads(run.summary.read_text())
    settings = flat(config.model_dump(mode="json"))
    kept: dict[str, Any] = {key: value for key, value in settings.items() if not matches(key, BESIDE_THE_POINT)}
    # What follows from other settings would stand beside them in every label.
    if config.router.gate == config.gate_by_itself:
        kept["router.gate"] = BY_ITSELF
    if config.algorithm.choice_after == config.choice_after_by_itself:
        kept["algorithm.choice_after"] = BY_ITSELF
    begun = run.costs_of_start()
    steps = [begun, *logs.read(run.metrics)]

    return Run(
        folder=folder,
        seed=config.seed,
        settings=kept,
        outcomes=after["systems"]["router"]["outcomes"],
        samples=int(summary["samples"]),
        train_s=begun.get("time/start_s", 0.0) + float(summary["train_wall_s"]),
        name=name,
        constant=not config.trains,
        # A version that wrote no start.json counted less: its costs are not known.
        operations=_spent(steps, "experts") if begun else 0.0,
        operations_cold=_spent(steps, "experts_cold") if begun else 0.0,
        prompts=after.get("prompts", ""),
        frozen=_weights(config, summary),
        pools=run.pools(),
    )


def frozen(folder: Path) -> list[Run]:
    """The baselines that a run measured, which no training can change, each as an arm of its own."""
    run = RunFolder(folder)
    config = run.saved_config()
    systems = _last(run, "after")["systems"]
    return [
        Run(folder, config.seed, {}, result["outcomes"], 0, 0.0, name=label(system), constant=True)
        for system, result in systems.items()
        if system not in (ROUTER, SHUFFLED_WITHIN_TASK, "shuffled")
    ]


def unrewarded(folder: Path, name: str) -> Run:
    """A run's router before its first update, as an arm: what its start alone has made of it."""
    run = RunFolder(folder)
    before, after = _last(run, "before"), read(folder, name)
    begun = run.costs_of_start()

    return replace(
        after,
        outcomes=before["systems"][ROUTER]["outcomes"],
        samples=0,
        train_s=begun.get("time/start_s", 0.0),
        operations=_spent([begun], "experts"),
        operations_cold=_spent([begun], "experts_cold"),
        prompts=before.get("prompts", ""),
    )


def validated(folder: Path) -> float:
    """Mean accuracy over tasks on the validation prompts after the last step at which they were asked.

    Raises:
        RunFolderError: when the run has not finished, or asked none.
    """
    run = RunFolder(folder)
    run.saved_config()
    return float(_last(run, "validation")["systems"][ROUTER]["mean"])


def _weights(config: RunConfig, summary: Mapping[str, Any]) -> dict[str, str]:
    """A hash for every model that is what its name says (an untrained one is not), as transformers holds it."""
    stored = [e for e in config.experts if e.weights == "stored" and e.engine == "transformers"]
    named: dict[str, EngineConfig] = {"Learner(rank 0": config.policy, **{f"Expert({e.name}": e for e in stored}}
    hosts = [(named.get(each["worker"].partition(")")[0].partition(",")[0]), each) for each in summary["frozen"]]
    return {f"{host.model} in {host.dtype}": each["sha256_before"] for host, each in hosts if host}


def _spent(lines: Sequence[Mapping[str, Any]], experts: str) -> float:
    """Floating-point operations of all stages; experts: as they were, or without a cache."""
    return sum(line.get(f"operations/{stage}", 0.0) for line in lines for stage in (experts, "rollout", "learner"))


def _last(run: RunFolder, kind: str) -> dict[str, Any]:
    lines = [line for line in logs.read(run.eval) if line["kind"] == kind]
    if not lines or not run.summary.is_file():
        raise RunFolderError(f"{run.path} has not finished: go on with it (--resume), or leave it out")
    return dict(lines[-1])
