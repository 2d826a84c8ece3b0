"""A grid of runs: every combination of some settings, with several seeds each.  Started again it runs only what is
missing."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.config import ConfigError, RunConfig, load
from cluster.jobs.client import JobError, Jobs
from cluster.keys import changed_keys
from cluster.run.folder import RunFolder

POLL_S = 1.0
STOP_S = 900.0  # for a step and its checkpoint
PATIENCE = 60  # polls of a job server that gives no answer


TUNING_SEED = 1000  # of the runs that choose a setting, and of no others


@dataclass(frozen=True)
class Arm:
    """Settings that are compared with others.

    name: for people; None where the settings themselves tell.
    rival: whether the first arm has to beat it, or it is the first arm with more to train.
    """

    slug: str
    overrides: tuple[str, ...]
    name: str | None = None
    rival: bool = True


@dataclass(frozen=True, eq=False)
class Point:
    """One run of the grid.  overrides: of the recipe, the run's name and seed among them."""

    config: RunConfig
    overrides: tuple[str, ...]
    arm: Arm

    @property
    def finished(self) -> bool:
        """Whether it has been run to its end."""
        summary = RunFolder(self.config.folder).summary
        if not summary.is_file():
            return False
        return not self.config.trains or json.loads(summary.read_text())["steps"] == self.config.steps

    def differing(self, folder: RunFolder) -> list[str]:
        """Keys in which the run of a folder is another one.

        A run alone may be made longer; beside others it would be one whose schedule began anew on its way.
        """
        saved = folder.saved_config()
        return ["steps"] * (saved.steps != self.config.steps) + changed_keys(saved, self.config)

    def check(self) -> None:
        """Refuses a run of this name that is another one.

        Raises:
            ConfigError: naming what differs.
        """
        folder = RunFolder(self.config.folder)
        if folder.config.is_file() and (keys := self.differing(folder)):
            raise ConfigError(
                f"{folder.path} is another run, with other {', '.join(keys[:4])}: give the sweep another run=NAME"
            )


class _Told(BaseModel):
    """An arm in a file that says more of it than its overrides."""

    model_config = ConfigDict(extra="forbid")
    overrides: list[str]
    rival: bool = True


_Given = list[str] | _Told


def combinations(over: Sequence[str]) -> list[Arm]:
    """Every combination of some values.

    Args:
        over: `key=value,value,...`, each a dimension of the grid.

    Raises:
        ConfigError: when a dimension is malformed.
    """
    dimensions = [_dimension(text) for text in over]
    found = []
    for values in itertools.product(*(values for _, values in dimensions)):
        chosen = tuple(f"{key}={value}" for (key, _), value in zip(dimensions, values, strict=True))
        found.append(Arm("-".join(_slug(text) for text in chosen), chosen))
    return found


def named_arms(path: Path, chosen: Sequence[str] = ()) -> list[Arm]:
    """Arms from a YAML file that maps names to lists of overrides, or to `{overrides: [...], rival: false}`.

    chosen: names; none means all.

    Raises:
        ConfigError: when the file is not of that form, or a name is not in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--arms {path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        given = TypeAdapter(dict[str, _Given]).validate_python(content, strict=True)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"][:1])) or "it"
        raise ConfigError(
            f"--arms {path} must map names to lists of key=value texts, or to {{overrides: [...], rival: false}}: "
            f"{where} does not"
        ) from error
    if not given:
        raise ConfigError(f"--arms {path} names no arm")
    if missing := [name for name in chosen if name not in given]:
        raise ConfigError(f"--arms {path} has no {missing[0]!r}: it has {', '.join(given)}")
    arms = []
    for name in chosen or given:
        each = given[name]
        told = each if isinstance(each, _Told) else _Told(overrides=each)
        arms.append(Arm(_plain(name), tuple(told.overrides), name, told.rival))
    return arms


def grid(recipe: Path, overrides: Sequence[str], arms: Sequence[Arm], seeds: int) -> list[Point]:
    """The runs of a sweep, seed by seed, so that an unfinished one has something to compare.

    An arm in which nothing trains is the same for every seed, and runs once.

    Raises:
        ConfigError: when two runs would have one name, or a run of that name is another one.
    """
    points = [
        point
        for seed in range(seeds)
        for arm in arms
        if (point := _point(recipe, overrides, arm, seed, f"s{seed}")).config.trains or seed == 0
    ]
    return _checked(points)


def tuning(recipe: Path, overrides: Sequence[str], arms: Sequence[Arm], tune: str) -> dict[Arm, list[Point]]:
    """For every arm that trains, a run with each value of a setting, measured on validation prompts at its end.

    Args:
        tune: `key=value,value,...`.

    Raises:
        ConfigError: as `combinations` and `grid`.
    """
    found: dict[Arm, list[Point]] = {}
    for arm in arms:
        for each in combinations([tune]):
            both = Arm(f"{arm.slug}-{each.slug}", (*arm.overrides, *each.overrides), arm.name, arm.rival)
            point = _point(recipe, overrides, both, TUNING_SEED, "tuning")
            if point.config.trains:
                every = (*point.overrides, f"evaluation.every={point.config.steps}")
                found.setdefault(arm, []).append(Point(load(recipe, every), every, both))
    _checked([point for points in found.values() for point in points])
    return found


def tuned(arms: Sequence[Arm], runs: Mapping[Arm, Sequence[Point]], score: Callable[[Point], float]) -> list[Arm]:
    """Every arm with the value that did best; equal ones go to the first."""
    return [replace(arm, overrides=max(runs[arm], key=score).arm.overrides) if arm in runs else arm for arm in arms]


def _point(recipe: Path, overrides: Sequence[str], arm: Arm, seed: int, suffix: str) -> Point:
    base = load(recipe, overrides)
    name = "-".join(part for part in (base.run, arm.slug, suffix) if part)
    every = (*overrides, *arm.overrides, f"seed={seed}", f"run={name}")
    return Point(load(recipe, every), every, arm)


def _checked(points: list[Point]) -> list[Point]:
    names = [point.config.run for point in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"the sweep gives two runs the name {min(twice)!r}: they must differ in letters or digits")
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
    with _progress(console) as bar, _all_stopped(console) as running:
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

    def wait(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)


class _Submitted:
    """A run as a job of a cluster."""

    def __init__(self, recipe: Path, point: Point, address: str | None) -> None:
        self.point, self._jobs, self._missed = point, Jobs(address), 0
        # A sweep that was killed has left its jobs to themselves.
        self._job = self._jobs.under_way(point.config) or self._jobs.find(self._jobs.submit(point.config))

    @property
    def over(self) -> bool:
        try:
            self._job = self._jobs.find(self._job.id)
        except (JobError, ConfigError):  # nothing answers, or a server that has just been started again knows no jobs
            self._missed += 1
            if self._missed > PATIENCE:
                raise
        else:
            self._missed = 0
        return self._job.over

    @property
    def succeeded(self) -> bool:
        return self._job.status == "SUCCEEDED"

    @property
    def said(self) -> str:
        return f"{self._job.message.strip().splitlines()[-1]} (all of it: musketeers logs {self._job.id})"

    def stop(self) -> None:
        self._jobs.stop(self._job)

    def wait(self) -> None:
        self._jobs.ended(self._job, STOP_S)


@contextlib.contextmanager
def _all_stopped(console: Console) -> Iterator[list[_Started | _Submitted]]:
    """However the block ends, by SIGTERM too, the runs under way are stopped with a checkpoint."""
    running: list[_Started | _Submitted] = []
    # SIGINT as well: a script's `&` ignores it, and its runs, which are stopped by it, would inherit that.
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield running
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each, ask in [*((each, each.stop) for each in running), *((each, each.wait) for each in running)]:
            try:
                ask()
            except (JobError, ConfigError) as error:  # the others are to be stopped all the same
                console.print(f"{each.point.config.run} may go on: {error}", highlight=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _dimension(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    found = [value.strip() for value in values.split(",") if value.strip()]
    if not equals or not key or not found:
        raise ConfigError(f"{text!r} is not of the form key=value,value")
    if key in ("run", "root", "seed"):
        raise ConfigError(f"{key}: the sweep gives its runs names and seeds itself")
    return key, found


def _slug(text: str) -> str:
    key, _, value = text.partition("=")
    return _plain(f"{key.rpartition('.')[2]}_{value}")


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", str(text)).strip("_")
