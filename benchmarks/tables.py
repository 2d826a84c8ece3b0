"""From measured steps to figures, and from figures to tables."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group
from rich.table import Table

Run = dict[str, Any]
Figures = dict[str, Any]

TITLES = {"distributed": "distributed (Ray)", "inline": "inline", "trl": "TRL"}
GOALS = {"distributed/inline": "at most 1.6", "distributed/trl": "at least 2", "inline/trl": ""}


def figures(runs: list[Run]) -> Figures:
    """Medians over all measured steps of a system and over its runs' throughputs and peaks; and ratios.

    Args:
        runs: each with `system`, `steps`, `samples_per_step` and `memory_mib`.
    """
    systems = {name: _of_system([r for r in runs if r["system"] == name]) for name in TITLES}
    found = {name: values for name, values in systems.items() if values}
    return {"systems": found, "ratios": _ratios(found)}


def _of_system(runs: list[Run]) -> Figures:
    steps = [step for run in runs for step in run["steps"]]
    if not steps:
        return {}
    speeds = [len(r["steps"]) * r["samples_per_step"] / sum(s["step"] for s in r["steps"]) for r in runs if r["steps"]]
    names = {name for run in runs for name in run["memory_mib"]}
    return {
        "runs": len(runs),
        "steps": len(steps),
        "seconds": {stage: median(step[stage] for step in steps) for stage in steps[0]},
        "samples_per_second": median(speeds),
        "samples_per_second_runs": speeds,
        "memory_mib": {name: max(run["memory_mib"].get(name, 0.0) for run in runs) for name in sorted(names)},
    }


def _ratios(systems: dict[str, Figures]) -> dict[str, float]:
    """Step time of distributed over inline; samples a second of ours over TRL's."""
    ratios = {}
    if "distributed" in systems and "inline" in systems:
        seconds = {name: systems[name]["seconds"]["step"] for name in ("distributed", "inline")}
        ratios["distributed/inline"] = seconds["distributed"] / seconds["inline"]
    for ours in ("distributed", "inline"):
        if ours in systems and "trl" in systems:
            speed = systems[ours]["samples_per_second"]
            ratios[f"{ours}/trl"] = speed / systems["trl"]["samples_per_second"]
    return ratios


def render(found: Figures) -> Group:
    """All tables, for the terminal."""
    return Group(_steps(found), _speeds(found), _memory(found))


def _steps(found: Figures) -> Table:
    table = Table("stage", title="A training step, milliseconds (median)", title_justify="left", min_width=64)
    ours = [name for name in ("distributed", "inline") if name in found["systems"]]
    for name in ours:
        table.add_column(TITLES[name], justify="right")
    table.add_column("ratio", justify="right")
    for stage in found["systems"][ours[0]]["seconds"] if ours else []:
        values = [found["systems"][name]["seconds"][stage] for name in ours]
        ratio = f"{values[0] / values[1]:.2f}" if len(values) == 2 and min(values) > 0 else ""
        table.add_row(stage, *(f"{1000 * value:.0f}" for value in values), ratio)
    return table


def _speeds(found: Figures) -> Table:
    table = Table("system", title="Samples a second", title_justify="left", min_width=64)
    for column in ("median", "each run"):
        table.add_column(column, justify="right")
    for name, values in found["systems"].items():
        each = "  ".join(f"{speed:.0f}" for speed in values["samples_per_second_runs"])
        table.add_row(TITLES[name], f"{values['samples_per_second']:.0f}", each)
    table.add_section()
    for name, ratio in found["ratios"].items():
        what = "step time" if name == "distributed/inline" else "samples a second"
        goal = f"goal: {GOALS[name]}" if GOALS[name] else ""
        table.add_row(f"{what}, {name}", f"{ratio:.2f}", goal)
    return table


def _memory(found: Figures) -> Table:
    table = Table(
        "processes", title="Peak memory, MiB (shared memory counted once)", title_justify="left", min_width=64
    )
    systems = found["systems"]
    for name in systems:
        table.add_column(TITLES[name], justify="right")
    parts = {part for values in systems.values() for part in values["memory_mib"]} - {"total"}
    largest = sorted(parts, key=lambda part: -max(v["memory_mib"].get(part, 0.0) for v in systems.values()))
    for part in ["total", *largest]:
        cells = [values["memory_mib"].get(part) for values in systems.values()]
        table.add_row(part, *("" if cell is None else f"{cell:.0f}" for cell in cells), end_section=part == "total")
    return table


def device() -> dict[str, Any]:
    """The processor's model and the cores this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        model = found[1].strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": model, "cores": cores}


def file_name(day: str, machine: dict[str, Any], what: str = "step") -> str:
    """`<what>-<day>-<device>.json`."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    return f"{what}-{day}-{slug}-{machine['cores']}-cores.json"
