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
from cluster.watch.logs import replace_file
from rewards.stream import PromptStream

NEEDED_BYTES = 256 * 2**20


class RunFolderError(ValueError):
    """A run folder that cannot be used; the message says what to do."""


class RunFolder:
    """Paths inside `runs/<name>/`, and the lock that refuses a second driver.

    mirror: the copy at the URL of the runs, if they have one.
    replaced: where the run that is replaced waits until the new one has a checkpoint.  No run can have that name.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path, self.mirror = path, mirror
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.eval = path / "eval.jsonl"
        self.summary = path / "summary.json"
        self.start = path / "start.json"
        self.data = path / "data.json"
        self.checkpoints = path / "checkpoints"
        self.groups = path / "groups"
        self.dead_letters = path / "dead_letters.jsonl"
        self.replaced = path.with_name(f".{path.name}.replaced")
        self._made = False  # by this start, and there is no checkpoint yet
        self._replacing = False  # and so the copy is still that of the old run
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
        if overwrite and self.mirror:
            _refuse_foreign(self.mirror.url, self.mirror.config(), config.run)
        if not self._there():
            if resume:
                raise RunFolderError(
                    f"{self.path} does not exist: nothing to resume; start without --resume{self._leftover('; ')}"
                )
            return
        if overwrite and self.path.is_symlink():
            raise RunFolderError(f"{self.path} is a link: not overwritten; remove the link, or give run=NAME")
        if overwrite:
            _refuse_foreign(self.path, self.config.read_bytes() if self.config.is_file() else b"", config.run)
        if not resume and not overwrite:
            raise RunFolderError(
                f"{self.path} exists: continue it with --resume, replace it with --overwrite, or give "
                f"run=NAME{self._leftover('; ')}"
            )
        if resume and (keys := changed_keys(self.saved_config(), config)):
            raise RunFolderError(
                f"{self.path} cannot be resumed with changed {', '.join(keys[:5])}: set them back or start anew"
            )

    def _there(self) -> bool:
        """Whether there is anything but an empty folder."""
        return self.path.is_symlink() or self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()))

    def _leftover(self, before: str) -> str:
        if not self.replaced.is_dir():
            return ""
        return f"{before}{self.replaced} is the run that an interrupted --overwrite was to replace: move or delete it"

    def note_leftover(self, note: Callable[[str], None]) -> None:
        """Says where the run lies that an `--overwrite` which was killed before its first checkpoint had moved."""
        if said := self._leftover(""):
            note(said)

    def logged(self) -> list[str]:
        """Names of what only a run that has had a checkpoint writes, as far as it is there."""
        files = (self.start, self.metrics, self.eval, self.dead_letters, self.summary)
        found = [path.name for path in files if path.is_file() and path.stat().st_size]
        return found + [self.groups.name] * (self.groups.is_dir() and any(self.groups.iterdir()))

    def check_lost(self) -> None:
        """Refuses to start anew where there is no checkpoint, and the logs say that there was one.

        Raises:
            RunFolderError: naming both.
        """
        there, logged = self.checkpoints.exists(), self.logged()
        if logged or (there and not self.checkpoints.is_dir()):
            raise RunFolderError(
                f"{self.path} has {', '.join(logged) or 'no logs'}, and {self.checkpoints} "
                f"{'holds no checkpoint' if there else 'is not there'}: put them back (is their disk mounted?), or "
                "start anew with --overwrite or run=NAME"
            )

    def prepare(self, config: RunConfig, overwrite: bool) -> None:
        """Makes the folder and writes the configuration; call after `check`.  What is replaced is moved aside."""
        self._replacing = overwrite
        if overwrite and self._there():
            self._move_aside()
        self._made = not self._there()
        self.path.mkdir(parents=True, exist_ok=True)
        replace_file(self.config, config.as_yaml().encode())

    def _move_aside(self) -> None:
        if self.replaced.exists() and not self.logged() and not any(self.checkpoints.glob("step-*")):
            shutil.rmtree(self.path)  # of a start that was killed: what it was to replace still waits
            return
        try:
            if self.replaced.exists():  # its successor has a checkpoint
                shutil.rmtree(self.replaced)
            self.path.rename(self.replaced)
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be moved aside: {error.strerror}: not overwritten; give run=NAME"
            ) from error

    def accept(self) -> None:
        """The run has a checkpoint: what it replaces goes, here now and at the URL before anything is copied there."""
        if self._replacing:
            shutil.rmtree(self.replaced, ignore_errors=True)
        if self._replacing and self.mirror:
            self.mirror.replace()
        self._made = self._replacing = False

    def withdraw(self, refused: bool) -> None:
        """Undoes `prepare` for a run that has ended without a checkpoint: what it was to replace is there again.

        refused: its configuration was, so that its name is to be free again; else what replaces nothing stays.
        """
        waiting = self._replacing and self.replaced.is_dir()
        if self._made and (refused or waiting):
            shutil.rmtree(self.path, ignore_errors=True)
        if waiting and not self._there():
            self.replaced.rename(self.path)
        self._made = False

    def saved_config(self) -> RunConfig:
        """The configuration the run was started with.

        Raises:
            RunFolderError: when this is no run's folder.
        """
        if not self.config.is_file():
            raise RunFolderError(f"{self.path} is no run's folder: it has no config.yaml")
        return _parsed(self.config.read_bytes(), str(self.config))

    def share(self, note: Callable[[str], None]) -> None:
        """Begins to bring the copy up to date, in a thread: nothing waits for storage while it trains.

        What fails is said and tried again the next time; the folder here is whole.
        """
        if self.mirror is not None and not self._replacing:
            self._pushing.submit(self._push, note)

    def shared(self, note: Callable[[str], None]) -> None:
        """Brings the copy up to date, and waits for it."""
        if self.mirror is not None and not self._replacing:
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

    def write_data(self, stream: PromptStream) -> None:
        """Writes `data.json`: what tells the run's prompts from others."""
        _write_whole(self.data, stream.identity())

    def pools(self) -> dict[str, str]:
        """A digest of every task's prompts, as `write_data` wrote it; nothing for a run of a version that did not."""
        return {name: task["pools"] for name, task in (self._identity() or {"tasks": {}})["tasks"].items()}

    def check_data(self, stream: PromptStream, saved: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Makes sure that a run's prompts are still those that it was trained on.

        Args:
            saved: what a checkpoint's driver has noted, which tells of a run without `data.json`.

        Raises:
            RewardsError: naming what differs.
        """
        identity = self._identity()
        if identity is None:
            identity = saved.get("stream")
            known = "those of its checkpoint are compared" if identity else "whether they are the same is not known"
            note(f"{self.path} is of a version that kept no digests of its prompts (data.json): {known}")
        if identity is not None:
            stream.check(identity)

    def _identity(self) -> dict[str, Any] | None:
        if not self.data.is_file():
            return None
        try:
            found = json.loads(self.data.read_text())
            return {"seed": found["seed"], "tasks": dict(found["tasks"])}
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.data} is damaged: delete it, and a checkpoint's digests count") from error


def _parsed(text: bytes, where: str) -> RunConfig:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{where} is damaged: {' '.join(str(error).split())}") from error
    if isinstance(values, dict) and isinstance(algorithm := values.get("algorithm"), dict):
        algorithm.setdefault("choice_after", 0)  # a version before this setting did not wait
    return parse(values, where)


def _refuse_foreign(place: Path | str, config: bytes | None, run: str) -> None:
    """Refuses to replace what is no run of this name.

    config: what is in its config.yaml; nothing where there is none, None where nothing is there at all.
    """
    if config is None:
        return
    if not config:
        raise RunFolderError(f"{place} is no run's folder (it has no config.yaml): not overwritten; move it away")
    try:
        name = _parsed(config, "its config.yaml").run
    except ValueError as error:
        raise RunFolderError(f"{place} is no run's folder ({error}): not overwritten; move it away") from error
    if name != run:
        raise RunFolderError(f"{place} is not overwritten: its config.yaml is of a run {name!r}; move it away")


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
