"""A training step of the quickstart, distributed, inline and with TRL, in turns: `make bench`.

Every run is a process of its own; the systems take turns, so that whatever else the machine does
meets all of them.  What is measured and how to read it: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import tables
from benchmarks.job import SYSTEMS, Job
from benchmarks.memory import MemoryWatch, end_tree

BEGAN = time.time()  # the limit counts from here, imports included
HERE = Path(__file__).resolve().parent
MODULES = {"distributed": "benchmarks.training", "inline": "benchmarks.training", "trl": "benchmarks.trl_grpo"}
LONGEST_S = 470
GRACE_S = 15.0
# Threads that wait for each other spin by default, which on a busy machine costs more than the work itself.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="key=value, as for `musketeers train`")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each system, in turns")
    parser.add_argument("--steps", type=int, default=40, help="measured steps a run")
    parser.add_argument("--warmup", type=int, default=10, help="steps before them that do not count")
    parser.add_argument("--seconds", type=float, default=LONGEST_S - GRACE_S, help="limit of everything together")
    parser.add_argument("--trl", type=Path, default=HERE.parent / ".venv/bench", help="where TRL is installed")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(line)
    if min(given.rounds, given.steps, given.warmup + 1) < 1:
        parser.error("--rounds and --steps must be at least 1, --warmup at least 0")
    if not 0 < given.seconds <= LONGEST_S - GRACE_S:
        parser.error(f"--seconds must be above 0 and at most {LONGEST_S - GRACE_S:g}")
    return given


def share(now: float, end: float, runs_left: int) -> float:
    """When a run has to be done, if all that are left of its round are to have as much of the time until `end`."""
    return now + max(0.0, end - now) / max(1, runs_left)


def run(job: Job, trl: Path) -> dict[str, Any]:
    """One process from start to end, and what it measured; no steps when it failed or had too little time."""
    environment = {**os.environ, **ENVIRONMENT}
    if job.system == "trl":
        environment["PYTHONPATH"] = os.pathsep.join([str(trl), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = Path(job.folder) / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", MODULES[job.system], job.as_argument()],
            cwd=HERE.parent,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        memory = MemoryWatch(process.pid)
        try:
            status: int | None = process.wait(max(1.0, job.until - time.time()) + GRACE_S)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            peaks = memory.stop()
            end_tree(process.pid)
            process.wait()
    result: dict[str, Any] = {"system": job.system, "steps": [], "memory_mib": peaks, "error": ""}
    if job.answer.is_file():
        return result | json.loads(job.answer.read_text())
    last = log.read_text(errors="replace").strip().splitlines()[-1:]
    return result | {"error": "out of time" if status is None else f"exit status {status}: {' '.join(last)}"}


def measure(given: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """All runs, the systems in turns; another round begins only when there is time for one like the last."""
    end, runs = BEGAN + given.seconds, []
    with tempfile.TemporaryDirectory(prefix="musketeers-bench-") as place:
        for number in range(given.rounds):
            began = time.time()
            for left, system in zip(range(len(given.systems), 0, -1), given.systems, strict=True):
                folder = Path(place) / f"{number}-{system}"
                folder.mkdir()
                until = share(time.time(), end, left)
                job = Job(system, given.config, tuple(given.overrides), given.warmup, given.steps, str(folder), until)
                load = os.getloadavg()[0]
                runs.append(run(job, given.trl) | {"load_before": load})
                console.print(_line(number, runs[-1]), highlight=False)
            if end - time.time() < time.time() - began:
                break
    return runs


def _line(number: int, result: dict[str, Any]) -> str:
    head = f"round {number + 1}, {tables.TITLES[result['system']]}, load {result['load_before']:.1f}"
    if not result["steps"]:
        return f"{head}: no steps ({result['error'] or 'out of time in the warm-up'})"
    mean = sum(step["step"] for step in result["steps"]) / len(result["steps"])
    return f"{head}: {len(result['steps'])} steps, {mean:.3f} s each"


def versions(trl: Path) -> dict[str, str]:
    """Of what the figures depend on; TRL lies beside the environment."""
    from cluster.run.records import versions as ours

    found = next(iter(importlib.metadata.distributions(name="trl", path=[str(trl)])), None)
    return ours() | {"trl": found.version if found else "not installed"}


def check(given: argparse.Namespace) -> None:
    """Refuses what would fail in every run: a wrong configuration, a zoo that is not built.

    Raises:
        ValueError: one line that says what to do.
    """
    from cluster.config import load
    from cluster.run.models import model_path

    for reference in load(given.config, given.overrides).models().values():
        model_path(reference)


def main(line: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, writes the results; the exit status."""
    given, console = arguments(line), Console()
    try:
        check(given)
    except ValueError as error:
        console.print(f"error: {error}", highlight=False, markup=False)
        return 2
    machine, began, found_versions = tables.device(), datetime.datetime.now(datetime.UTC), versions(given.trl)
    console.print(f"{machine['cpu']}, {machine['cores']} cores; at most {given.seconds:.0f} s", highlight=False)
    if os.getloadavg()[0] > machine["cores"] / 2:
        console.print("the machine is busy with something else: the figures will be worse than they could be")
    runs = measure(given, console)
    found = tables.figures(runs)
    console.print(tables.render(found))
    results = {
        "date": began.date().isoformat(),
        "device": machine,
        "versions": found_versions,
        "settings": {
            key: getattr(given, key) for key in ("config", "overrides", "rounds", "steps", "warmup", "seconds")
        },
        **found,
        "runs": runs,
    }
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / tables.file_name(results["date"], machine)
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    return 0 if set(found["systems"]) == set(given.systems) else 1


if __name__ == "__main__":
    sys.exit(main())
