"""A run's folder at a URL, such as `s3://bucket/runs`: the driver writes to this machine's disk, and every checkpoint
is followed by a copy.  A run goes on from the copy, wherever its next driver starts."""

from __future__ import annotations

import shutil
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

    def exists(self) -> bool:
        """Whether there is a copy."""
        return bool(self._files.exists(f"{self._place}/config.yaml"))

    def pull(self) -> bool:
        """Makes the folder what the copy is; False when there is no copy."""
        if not self.exists():
            return False
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        for remote in self._files.find(self._place):
            target = self.folder / PurePosixPath(remote).relative_to(PurePosixPath(self._place))
            target.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(remote, str(target))
        self._known = self._here()
        return True

    def push(self) -> int:
        """Copies what has changed, a checkpoint's manifest last, and removes what is gone.  How many files."""
        here = self._here()
        changed = [name for name, stamp in here.items() if self._known.get(name) != stamp]
        for name in sorted(changed, key=lambda name: (name.endswith(LAST), name)):
            self._files.makedirs(f"{self._place}/{PurePosixPath(name).parent}", exist_ok=True)
            self._files.put_file(str(self.folder / name), f"{self._place}/{name}")
        gone = sorted(self._known.keys() - here.keys(), key=lambda name: (not name.endswith(LAST), name))
        for name in gone:
            self._files.rm_file(f"{self._place}/{name}")
        self._known = here
        return len(changed)

    def clear(self) -> None:
        """Removes the copy."""
        if self._files.exists(self._place):
            self._files.rm(self._place, recursive=True)
        self._known = {}

    def _here(self) -> dict[str, tuple[int, int]]:
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file() and not path.name.endswith(SKIPPED):
                stat = path.stat()
                found[path.relative_to(self.folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
        return found
