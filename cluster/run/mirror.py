"""A run's folder at a URL, such as `s3://bucket/runs`: the driver writes to this machine's disk, and every checkpoint
is followed by a copy.  A run goes on from the copy, wherever its next driver starts."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from cluster.config import ConfigError

SKIPPED = (".partial", ".tmp")
LAST = "manifest.json"  # makes a checkpoint exist


class Mirror:
    """The copy of one run's folder.

    root: the URL of the runs.

    Raises:
        ConfigError: when fsspec cannot open it; names the URL.
    """

    def __init__(self, root: str, run: str, folder: Path) -> None:
        import fsspec

        self.url, self.folder = f"{root.rstrip('/')}/{run}", folder
        try:
            self._files, self._place = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(f"root: {root} cannot be opened: {error}") from error
        self._known: dict[str, tuple[int, int]] = {}
        self._replaces = False

    def exists(self) -> bool:
        """Whether there is a copy."""
        with self._opened():
            return bool(self._files.exists(f"{self._place}/config.yaml"))

    def config(self) -> bytes | None:
        """What is in the copy's config.yaml; nothing where there is none, None where nothing is there at all."""
        with self._opened():
            if self._files.exists(f"{self._place}/config.yaml"):
                return bytes(self._files.cat_file(f"{self._place}/config.yaml"))
            return b"" if self._files.exists(self._place) and self._files.find(self._place) else None

    def check(self) -> None:
        """Refuses a URL that cannot be written, before anything expensive starts.

        Raises:
            ConfigError: naming it.
        """
        probe = f"{self._place}.probe-{secrets.token_hex(8)}"
        with self._opened():
            self._files.makedirs(str(PurePosixPath(self._place).parent), exist_ok=True)
            self._files.pipe_file(probe, b"may be removed")
            self._files.rm_file(probe)

    def pull(self) -> bool:
        """Makes the folder what the copy is, unless the folder has got further; False when it stays as it is."""
        with self._opened():
            if not self._files.exists(f"{self._place}/config.yaml"):
                return False
            there = self._files.find(self._place)
            names = {remote: str(PurePosixPath(remote).relative_to(PurePosixPath(self._place))) for remote in there}
            if self.folder.exists() and _newest(self._here()) >= _newest(names.values()):
                return False
            fresh = self.folder.with_name(f".{self.folder.name}.fetched")
            shutil.rmtree(fresh, ignore_errors=True)
            for remote, name in names.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(remote, str(fresh / name))
        if self.folder.exists():
            shutil.rmtree(self.folder)
        fresh.rename(self.folder)
        self._known = self._here()
        return True

    def push(self) -> int:
        """Copies what has changed, a checkpoint's manifest last, and removes what is gone.  How many files."""
        if self._replaces:
            self._clear()
        here = self._here()
        changed = [name for name, stamp in here.items() if self._known.get(name) != stamp]
        for name in sorted(changed, key=lambda name: (name.endswith(LAST), name)):
            self._files.makedirs(f"{self._place}/{PurePosixPath(name).parent}", exist_ok=True)
            try:
                self._files.put_file(str(self.folder / name), f"{self._place}/{name}")
            except FileNotFoundError:
                del here[name]  # an old checkpoint, removed meanwhile
        gone = sorted(self._known.keys() - here.keys(), key=lambda name: (not name.endswith(LAST), name))
        for name in gone:
            self._files.rm_file(f"{self._place}/{name}")
        self._known = here
        return len(changed)

    def replace(self) -> None:
        """The copy is of another run, which goes before anything is copied the next time."""
        self._replaces = True

    def _clear(self) -> None:
        """Removes the copy; first what makes its checkpoints exist, for nobody is to go on from half of it."""
        if self._files.exists(self._place):
            for name in self._files.find(self._place):
                if name.endswith(LAST):
                    self._files.rm_file(name)
            self._files.rm(self._place, recursive=True)
        self._known, self._replaces = {}, False

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Every kind of storage has exceptions of its own; to people they all mean that the URL cannot be used."""
        try:
            yield
        except Exception as error:
            raise ConfigError(f"root: {self.url} cannot be used: {type(error).__name__}: {error}") from error

    def _here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.name.endswith(SKIPPED):
                stat = path.stat()
                found[path.relative_to(self.folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found


def _newest(names: Iterable[str]) -> str:
    """The newest whole checkpoint among some files; step numbers have leading zeros."""
    return max((name for name in names if name.startswith("checkpoints/") and name.endswith(LAST)), default="")
