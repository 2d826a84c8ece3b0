"""What the pipeline costs and what overlap brings, all in one run: `make bench-pipeline`.

Parts a, b and d drive workers without models over real Ray; part c trains the quickstart twice.
What is measured and how to read it: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
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
from rich.progress import track
from rich.table import Table

from benchmarks import tables
from benchmarks.simulated import (
    Clock,
    Latencies,
    Stream,
    configuration,
    make_driver,
    simulated_fleet,
    start_hosts,
    workers,
)
from cluster.run import actors
from learner.engine import free_port
from rollout.types import Sampling

HERE = Path(__file__).resolve().parent
SAMPLING = Sampling(temperature=1.0, max_new_tokens=1, samples=2)
WORKERS = 64
INJECTED = Latencies(rollout_s=0.2, rollout_variation=1.0, reward_s=0.06, learner_s=0.2)
QUICKSTART_ROUTER = 2_796_032  # parameters


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default="abcd", help="which parts, e.g. abd for all but the two trainings")
    parser.add_argument("--hosts", type=int, default=6, help="processes the simulated workers live in, 3 at least")
    parser.add_argument("--steps", type=int, default=30, help="updates a simulated run")
    parser.add_argument("--rounds", type=int, default=3, help="of the control plane against the bare chain, in turns")
    parser.add_argument("--config", default="configs/quickstart.yaml", help="what part c trains")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(line)
    if not given.parts or set(given.parts) - set("abcd"):
        parser.error("--parts takes letters from abcd")
    if min(given.hosts - 2, given.steps - 5, given.rounds) < 1:
        parser.error("--hosts must be at least 3, --steps 6, --rounds 1")
    return given


# a: the control plane alone


async def bare_chain(hosts: Sequence[Any], groups: int, batch: int) -> float:
    """Groups a second of the same calls, sent as fast as three batches may be under way, with no driver around them."""
    learner, expert, *others = hosts
    policies, verifiers = workers("Rollout", WORKERS, others), workers("Reward", WORKERS, others)
    encoder, trainer, stream = workers("Expert", 1, [expert])[0], workers("Learner", 1, [learner])[0], Stream()
    room = asyncio.Semaphore(3)
    router = trainer.call("snapshot")

    async def through(ordinal: int) -> list[Any]:
        prompt = stream.prompt(ordinal)
        feature = encoder.call("encode", [prompt.messages], [0])
        rollout, _ = policies[ordinal % WORKERS].call("sample", [prompt], SAMPLING, router, feature, returns=2)
        scored, report = verifiers[ordinal % WORKERS].call("score", rollout, returns=2)
        await report
        return [scored, feature]

    async def one_batch(ordinals: range) -> None:
        async with room:
            pairs = await asyncio.gather(*(through(ordinal) for ordinal in ordinals))
            parts = [scored for scored, _ in pairs] + [feature for _, feature in pairs]
            done = [trainer.call("update", list(ordinals), *parts)]
            await asyncio.gather(*done, trainer.call("snapshot"), trainer.call("moments"))

    began = time.perf_counter()
    await asyncio.gather(*(one_batch(range(at, at + batch)) for at in range(0, groups, batch)))
    return groups / (time.perf_counter() - began)


async def driven(hosts: Sequence[Any], steps: int, batch: int, staleness: int, rollouts: int) -> dict[str, float]:
    """The same calls by the real driver."""
    clock = Clock()
    driver = make_driver(
        configuration(steps, batch, staleness, rollouts), simulated_fleet(hosts, rollouts, rollouts), clock
    )
    cpu, began = time.process_time(), time.perf_counter()
    await driver.run()
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "groups_per_second": steps * batch / took,
        "driver_cpu_ms_per_group": 1000 * cpu / (steps * batch),
        "staleness_max": max(step["staleness/max"] for step in clock.steps),
        "steady_step_s": (clock.arrivals[-1] - clock.arrivals[4]) / (steps - 5),
        "discarded": float(len(driver.admission.filtered) + len(driver.admission.dead)),
    }


async def control_plane(hosts: Sequence[Any], given: argparse.Namespace) -> dict[str, Any]:
    """Part a: bare chain and driver in turns."""
    bare, ours = [], []
    for _ in track(range(given.rounds), "a: the control plane alone"):
        bare.append(await bare_chain(hosts, given.steps * WORKERS, WORKERS))
        ours.append(await driven(hosts, given.steps, WORKERS, 2, WORKERS))
    ratios = sorted(o["groups_per_second"] / b for o, b in zip(ours, bare, strict=True))
    return {"bare_groups_per_second": bare, "driver": ours, "ratio": ratios[len(ratios) // 2]}


# b: injected latencies


async def overlap(hosts: Sequence[Any], given: argparse.Namespace) -> dict[str, Any]:
    """Part b: 32 prompts an update, 32 workers, strict and overlapped."""
    found = {}
    for staleness in track((0, 1, 2), "b: overlap"):
        found[f"S = {staleness}"] = await driven(hosts, given.steps, 32, staleness, 32)
    speed = {name: result["groups_per_second"] for name, result in found.items()}
    return {"runs": found, "ratio": speed["S = 2"] / speed["S = 0"]}


# c: the quickstart


def quickstart(config: str) -> dict[str, Any]:
    """Part c: the same recipe trained strictly and with a staleness of at most 2."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="musketeers-bench-") as place:
        for staleness in track((0, 2), "c: the quickstart, twice"):
            run, log = f"s{staleness}", Path(place) / f"s{staleness}.log"
            overrides = [f"root={place}", f"run={run}", f"max_staleness={staleness}"]
            with log.open("wb") as output:
                command = [sys.executable, "-m", "cluster.cli", "train", config, *overrides]
                code = subprocess.run(command, cwd=HERE.parent, stdout=output, stderr=output, check=False).returncode
            if code:
                return {"error": f"{run} ended with {code}: {log.read_text()[-500:]}"}
            summary = json.loads((Path(place) / run / "summary.json").read_text())
            steps = [json.loads(line) for line in (Path(place) / run / "metrics.jsonl").read_text().splitlines()]
            found[f"S = {staleness}"] = {
                "accuracy": summary["eval"]["router"]["tasks"],
                "train_wall_s": summary["train_wall_s"],
                "samples_per_second": summary["samples"] / summary["train_wall_s"],
                "staleness_max": max(step["staleness/max"] for step in steps),
            }
    return found


# d: publication


async def publication(hosts: Sequence[Any]) -> dict[str, Any]:
    """Part d: from the update's end until all workers have read the new router, and what that sends and keeps."""
    import ray
    from ray import cloudpickle

    learner, _, *others = hosts
    trainer, receivers = workers("Learner", 1, [learner])[0], workers("Rollout", WORKERS, others)
    seconds = []
    for _ in range(10):
        began = time.time()
        router = trainer.call("snapshot")
        done = await asyncio.gather(*(worker.call("receive", router) for worker in receivers))
        seconds.append(max(done) - began)
    size = len(cloudpickle.dumps(ray.get(router)))
    return {"workers": WORKERS, "seconds": sorted(seconds)[len(seconds) // 2], "bytes": size, "processes": len(others)}


def simulated(given: argparse.Namespace) -> dict[str, Any]:
    """Parts a, b and d, on a Ray cluster of their own."""
    found: dict[str, Any] = {}
    actors.join_cluster(None, free_port(), "benchmark")
    try:
        if "a" in given.parts:
            found["control_plane"] = asyncio.run(control_plane(start_hosts(given.hosts, Latencies()), given))
        if "b" in given.parts:
            found["overlap"] = asyncio.run(overlap(start_hosts(given.hosts, INJECTED), given))
        if "d" in given.parts:
            found["publication"] = asyncio.run(
                publication(start_hosts(given.hosts, Latencies(), parameters=QUICKSTART_ROUTER))
            )
    finally:
        actors.leave_cluster()
    return found


def render(found: dict[str, Any]) -> Table:
    """One table of what was found."""
    table = Table("what", title="The pipeline", title_justify="left", min_width=80)
    for column in ("figure", "goal"):
        table.add_column(column, justify="right")
    if a := found.get("control_plane"):
        cpu = min(run["driver_cpu_ms_per_group"] for run in a["driver"])
        table.add_row("a: groups a second, bare Ray chain", _each(a["bare_groups_per_second"]), "")
        table.add_row("a: the driver's", _each([run["groups_per_second"] for run in a["driver"]]), "")
        table.add_row("a: driver / bare chain", f"{a['ratio']:.2f}", "at least 0.7")
        table.add_row("a: driver's CPU, ms a group", f"{cpu:.2f}", "", end_section=True)
    if b := found.get("overlap"):
        for name, run in b["runs"].items():
            figure = f"{run['groups_per_second']:.0f}   (update every {1000 * run['steady_step_s']:.0f} ms)"
            table.add_row(f"b: groups a second, {name}", figure, "")
        discarded = sum(run["discarded"] for run in b["runs"].values())
        table.add_row("b: S = 2 / S = 0", f"{b['ratio']:.2f}", "at least 2.0")
        table.add_row("b: groups discarded", f"{discarded:.0f}", "0", end_section=True)
    if c := found.get("quickstart"):
        for name, run in c.items():
            figure = str(run)
            if name != "error":
                shown = ", ".join(f"{task} {accuracy:.3f}" for task, accuracy in run["accuracy"].items())
                figure = f"{run['samples_per_second']:.0f} samples/s; {shown}"
            table.add_row(f"c: quickstart, {name}", figure, "", end_section=name != "S = 0")
    if d := found.get("publication"):
        figure = f"{1000 * d['seconds']:.0f} ms, {d['bytes'] / 1e6:.1f} MB"
        table.add_row(f"d: a new router at {d['workers']} workers in {d['processes']} processes", figure, "")
    return table


def _each(values: Sequence[float]) -> str:
    return "  ".join(f"{value:.0f}" for value in values)


def main(line: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the results; the exit status."""
    given, console = arguments(line), Console()
    machine, began = tables.device(), datetime.datetime.now(datetime.UTC)
    console.print(f"{machine['cpu']}, {machine['cores']} cores, load before {os.getloadavg()[0]:.1f}", highlight=False)
    found = simulated(given) if set(given.parts) & set("abd") else {}
    if "c" in given.parts:
        found["quickstart"] = quickstart(given.config)
    console.print(render(found))
    results = {"date": began.date().isoformat(), "device": machine, "load_before": os.getloadavg()[0], **found}
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / tables.file_name(results["date"], machine, "pipeline")
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    return 1 if "error" in found.get("quickstart", {}) else 0


if __name__ == "__main__":
    sys.exit(main())
