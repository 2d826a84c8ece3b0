"""A sweep from its plan to its comparison: choose each arm's settings, train with every seed, compare."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.run import finished
from cluster.run.preflight import check_names
from cluster.run.reporting import report_arms
from cluster.run.sweep import Arm, Point, grid, sweep, tuned, tuning
from cluster.watch import comparison
from cluster.watch.ladder import BEYOND


@dataclass(frozen=True)
class Plan:
    """What is compared.

    tune: a setting that every arm chooses for itself before, on validation prompts.  command: that asked for it all.
    """

    recipe: Path
    overrides: tuple[str, ...]
    arms: list[Arm]
    seeds: int
    tune: str | None
    command: str

    @property
    def beyond(self) -> tuple[str, ...]:
        """Labels of what the first arm need not beat."""
        return (*BEYOND, *(arm.name for arm in self.arms if arm.name and not arm.rival))


def run(plan: Plan, parallel: int, address: str | None, out: Path | None, console: Console) -> bool:
    """Runs what is missing, and compares what has finished; returns whether every run has succeeded.

    Args:
        parallel: runs at once.  address: of a cluster that takes them as jobs.
        out: where `results.json`, `.csv` and `.md` go, and what was chosen.

    Raises:
        ConfigError: when the plan gives no runs that can be told apart.
    """
    arms = plan.arms
    if plan.tune:
        trials = tuning(plan.recipe, plan.overrides, arms, plan.tune)
        if not _all_run(plan, [point for points in trials.values() for point in points], parallel, address, console):
            return False
        scores = {point: finished.validated(point.config.folder) for points in trials.values() for point in points}
        arms = tuned(arms, trials, scores.__getitem__)
        _tell(trials, scores, arms, out, console)
    points = grid(plan.recipe, plan.overrides, arms, plan.seeds)
    succeeded = _all_run(plan, points, parallel, address, console)
    done = comparable([point for point in points if point.finished], arms, console)
    if done:
        runs = [finished.read(point.config.folder, point.arm.name) for point in done]
        frozen = finished.frozen(done[0].config.folder) if any(arm.name for arm in arms) else []
        known = {run.name for run in runs}
        found = comparison.compare([*runs, *(run for run in frozen if run.name not in known)])
        console.print(comparison.Comparison(found))
        if out:
            config = done[0].config
            page = report_arms(found, out / "report.html", plan.command, config, plan.beyond)
            for path in [*comparison.write(found, out), page]:
                console.print(path, highlight=False, soft_wrap=True)
    return succeeded


def comparable(done: Sequence[Point], arms: Sequence[Arm], console: Console) -> list[Point]:
    """Finished runs arm by arm, the yardstick's first; what cannot be measured by it is left out, with a word."""
    by_arm = {arm: [point for point in done if point.arm == arm] for arm in arms}
    yardstick = {point.config.seed for point in by_arm[arms[0]]}
    if not yardstick:
        console.print("the first arm, by which the others are measured, has no finished run: nothing is compared")
        return []
    kept: list[Point] = []
    for arm, mine in by_arm.items():
        if all(point.config.trains and point.config.seed not in yardstick for point in mine):
            console.print(f"{arm.name or arm.slug or 'the recipe'} has no seed in common with the first arm: left out")
            continue
        kept += mine
    return kept


def _all_run(plan: Plan, points: Sequence[Point], parallel: int, address: str | None, console: Console) -> bool:
    for point in points:
        check_names(point.config)
    return not sweep(plan.recipe, points, parallel, address, console)


def _tell(
    trials: dict[Arm, list[Point]],
    scores: dict[Point, float],
    arms: Sequence[Arm],
    out: Path | None,
    console: Console,
) -> None:
    """What every arm has chosen, and how its choices did."""
    chosen = {}
    for arm, points in trials.items():
        best = next(each for each in arms if each.slug == arm.slug)
        tried = {point.arm.overrides[-1]: scores[point] for point in points}
        chosen[arm.name or arm.slug] = {"chosen": best.overrides[-1], "validation": tried}
        console.print(
            f"{arm.name or arm.slug}: {best.overrides[-1]}  "
            f"({', '.join(f'{value:.3f}' for value in tried.values())} on validation prompts)",
            highlight=False,
        )
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tuning.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
