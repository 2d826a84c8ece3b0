"""A grid of runs: every combination of some settings, with several seeds each.  Started again it runs only what is
missing."""

from __future__ import annotations

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.config import ConfigError, RunConfig, changed_keys, load
from cluster.jobs.client import Jobs
from cluster.run.folder import RunFolder

POLL_S = 1.0
STOP_S = 900.0  # for a step and its checkpoint


@dataclass(frozen=True)
class Point:
    """One run of the grid.  overrides: of the recipe, the run's name and seed among them."""

    config: RunConfig
    overrides: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it has been run to its end."""
        return RunFolder(self.config.folder).summary.is_file()

    def check(self) -> None:
        """Refuses a run of this name that computes something else.

        Raises:
            ConfigError: naming what differs.
        """
        folder = RunFolder(self.config.folder)
        if folder.config.is_file() and (keys := changed_keys(folder.saved_config(), self.config)):
            said = ", ".join(keys[:4])
            raise ConfigError(f"{folder.path} is another run ({said} differ): give the sweep another run=NAME")


def grid(recipe: Path, overrides: Sequence[str], over: Sequence[str], seeds: int) -> list[Point]:
    """The runs of a sweep, seed by seed, so that an unfinished one has something to compare.

    Args:
        over: `key=value,value,...`, each a dimension of the grid.

    Raises:
        ConfigError: when a dimension is malformed, or two runs would have one name.
    """
    dimensions = [_dimension(text) for text in over]
    base = load(recipe, overrides)
    points = []
    for seed in range(seeds):
        for values in itertools.product(*(values for _, values in dimensions)):
            chosen = [f"{key}={value}" for (key, _), value in zip(dimensions, values, strict=True)]
            name = "-".join([base.run, *(_slug(text) for text in chosen), f"s{seed}"])
            every = (*overrides, *chosen, f"seed={seed}", f"run={name}")
            points.append(Point(load(recipe, every), every))
    names = [point.config.run for point in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--over gives two runs the name {min(twice)!r}: values must differ in letters or digits")
    for point in points:
        point.check()
    return points


def sweep(recipe: Path, points: Sequence[Point], parallel: int, address: str | None, console: Console) -> list[Point]:
    """Runs what is missing; returns the runs that did not succeed.

    Args:
        parallel: at once.
        address: of the cluster that takes them as jobs; None runs them on this machine.
    """
    missing = [point for point in points if not point.finished]
    console.print(f"{len(points)} runs, {len(points) - len(missing)} of them finished before", highlight=False)
    failed: list[Point] = []
    start = _Submitted if address else _Started
    with _progress(console) as bar, _all_stopped() as running:
        task = bar.add_task("runs", total=len(points), completed=len(points) - len(missing))
        waiting = iter(missing)
        while True:
            for point in itertools.islice(waiting, parallel - len(running)):
                running.append(start(recipe, point, address))
            if not running:
                return failed
            bar.update(task, description=", ".join(each.point.config.run for each in running))
            time.sleep(POLL_S)
            for each in [each for each in running if each.over]:
                running.remove(each)
                bar.advance(task)
                if not each.succeeded:
                    failed.append(each.point)
                    bar.console.print(f"{each.point.config.run} failed: {each.said}", highlight=False, soft_wrap=True)


class _Started:
    """A run as a process of its own, with its output in a file beside its folder."""

    def __init__(self, recipe: Path, point: Point, address: str | None) -> None:
        self.point, self.log = point, Path(f"{point.config.folder}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "cluster.cli", "train", str(recipe), *point.overrides, "--auto-resume"]
        with self.log.open("ab") as out:
            # In a group of its own: Ctrl-C reaches the sweep alone, which then stops its runs once.
            self._process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def over(self) -> bool:
        return self._process.poll() is not None

    @property
    def succeeded(self) -> bool:
        return self._process.returncode == 0

    @property
    def said(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'nothing'} (all of it: {self.log})"

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def wait(self, limit_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(limit_s)


class _Submitted:
    """A run as a job of a cluster."""

    def __init__(self, recipe: Path, point: Point, address: str | None) -> None:
        self.point, self._jobs = point, Jobs(address)
        self._job = self._jobs.find(self._jobs.submit(point.config))

    @property
    def over(self) -> bool:
        self._job = self._jobs.find(self._job.id)
        return self._job.over

    @property
    def succeeded(self) -> bool:
        return self._job.status == "SUCCEEDED"

    @property
    def said(self) -> str:
        return f"{self._job.message.strip().splitlines()[-1]} (all of it: musketeers logs {self._job.id})"

    def stop(self) -> None:
        self._jobs.stop(self._job)

    def wait(self, limit_s: float) -> None:
        self._jobs.ended(self._job, limit_s)


@contextlib.contextmanager
def _all_stopped() -> Iterator[list[_Started | _Submitted]]:
    """However the block ends, the runs under way are stopped with a checkpoint."""
    running: list[_Started | _Submitted] = []
    try:
        yield running
    finally:
        for each in running:
            each.stop()
        for each in running:
            each.wait(STOP_S)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _dimension(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not equals or not key or not found:
        raise ConfigError(f"--over {text!r} is not of the form key=value,value")
    if key in ("run", "root", "seed"):
        raise ConfigError(f"--over {key}: the sweep gives its runs names and seeds itself")
    return key, found


def _slug(text: str) -> str:
    key, _, value = text.partition("=")
    return re.sub(r"[^A-Za-z0-9.]+", "_", f"{key.rpartition('.')[2]}_{value}").strip("_")
