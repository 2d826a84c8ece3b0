"""A run's folder: created, locked, described; refused when it exists and nobody said what to do."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from cluster.config import RunConfig, is_url, parse
from cluster.keys import changed_keys
from cluster.run.mirror import Mirror

NEEDED_BYTES = 256 * 2**20


class RunFolderError(ValueError):
    """A run folder that cannot be used; the message says what to do."""


class RunFolder:
    """Paths inside `runs/<name>/`, and the lock that refuses a second driver.

    mirror: the copy at the URL of the runs, if they have one.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path, self.mirror = path, mirror
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.eval = path / "eval.jsonl"
        self.summary = path / "summary.json"
        self.start = path / "start.json"
        self.checkpoints = path / "checkpoints"
        self.groups = path / "groups"
        self.dead_letters = path / "dead_letters.jsonl"
        self._lock = FileLock(str(path) + ".lock")
        self._pushing = ThreadPoolExecutor(max_workers=1)  # one after the other

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """The folder of a configuration's run.

        Raises:
            ConfigError: when its root is a URL that cannot be opened.
        """
        path = config.folder
        return cls(path, Mirror(config.root, config.run, path) if is_url(config.root) else None)

    def started(self) -> bool:
        """Whether there is a run to go on with, here or at its URL."""
        return self.config.is_file() or (self.mirror is not None and self.mirror.exists())

    def fetch(self) -> None:
        """Takes over the copy of a run at a URL: its last driver may have been on another machine."""
        if self.mirror:
            self.mirror.pull()

    def lock(self) -> None:
        """Refuses a second driver.  Of a run at a URL only one on this machine is noticed.

        Raises:
            RunFolderError: when another process holds the lock, or the place cannot be written.
            ConfigError: when the URL cannot be written.
        """
        if self.mirror:
            self.mirror.check()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderError(
                f"{self.path} is in use by another run: wait for it, or choose another run=NAME"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be written: {error.strerror}: choose another root=FOLDER"
            ) from None

    def unlock(self) -> None:
        """Lets the folder go."""
        self._lock.release()

    def check(self, config: RunConfig, resume: bool, overwrite: bool) -> None:
        """Refuses what must not be written over or gone on with; changes nothing.

        Raises:
            RunFolderError: when the folder exists and neither was asked for; when a resume would
                change what is computed, naming the keys; when the disk is full.
        """
        check_space(self.path.parent)
        exists = self.path.exists() and any(self.path.iterdir())
        if not exists and resume:
            raise RunFolderError(f"{self.path} does not exist: nothing to resume; start without --resume")
        if not exists:
            return
        if overwrite and not self.config.is_file():
            raise RunFolderError(
                f"{self.path} is no run's folder (it has no config.yaml): not overwritten; move it away"
            )
        if not resume and not overwrite:
            raise RunFolderError(
                f"{self.path} exists: continue it with --resume, replace it with --overwrite, or give run=NAME"
            )
        if resume and (keys := changed_keys(self.saved_config(), config)):
            raise RunFolderError(
                f"{self.path} cannot be resumed with changed {', '.join(keys[:5])}: set them back or start anew"
            )

    def prepare(self, config: RunConfig, overwrite: bool) -> None:
        """Makes the folder and writes the configuration; call after `check`."""
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        if overwrite and self.mirror:
            self.mirror.clear()
        self.path.mkdir(parents=True, exist_ok=True)
        self.config.write_text(config.as_yaml())

    def withdraw(self) -> None:
        """Removes the folder of a run that was refused after `prepare` and has not begun: its name is free again."""
        if not self.start.exists() and not self.checkpoints.exists():
            shutil.rmtree(self.path)

    def saved_config(self) -> RunConfig:
        """The configuration the run was started with.

        Raises:
            RunFolderError: when this is no run's folder.
        """
        if not self.config.is_file():
            raise RunFolderError(f"{self.path} is no run's folder: it has no config.yaml")
        values = yaml.safe_load(self.config.read_text())
        if isinstance(values, dict) and isinstance(algorithm := values.get("algorithm"), dict):
            algorithm.setdefault("choice_after", 0)  # a version before this setting did not wait
        return parse(values, str(self.config))

    def share(self, note: Callable[[str], None]) -> None:
        """Begins to bring the copy up to date, in a thread: nothing waits for storage while it trains.

        What fails is said and tried again the next time; the folder here is whole.
        """
        if self.mirror is not None:
            self._pushing.submit(self._push, note)

    def shared(self, note: Callable[[str], None]) -> None:
        """Brings the copy up to date, and waits for it."""
        if self.mirror is not None:
            self._pushing.submit(self._push, note).result()

    def _push(self, note: Callable[[str], None]) -> None:
        assert self.mirror is not None
        try:
            self.mirror.push()
        except Exception as error:  # noqa: BLE001 - every kind of storage has exceptions of its own
            note(f"{self.mirror.url} could not be brought up to date, {self.path} is whole: {error}")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes `summary.json` whole or not at all."""
        _write_whole(self.summary, summary)

    def write_start(self, costs: Mapping[str, float]) -> None:
        """Writes `start.json`: what was spent on the router before its first update."""
        _write_whole(self.start, costs)

    def costs_of_start(self) -> dict[str, float]:
        """What `write_start` wrote; nothing for a run of a version that did not."""
        return json.loads(self.start.read_text()) if self.start.is_file() else {}


def _write_whole(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the place in errors of writing, which a full disk raises without one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_space(where: Path) -> None:
    """Refuses a disk that is nearly full, before anything expensive starts.

    Raises:
        RunFolderError: with the numbers in it.
    """
    place = where
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < NEEDED_BYTES:
        raise RunFolderError(
            f"no disk space at {place}: {free / 2**20:.0f} MiB free, {NEEDED_BYTES / 2**20:.0f} MiB needed: "
            "free some, or choose another root=FOLDER"
        )
