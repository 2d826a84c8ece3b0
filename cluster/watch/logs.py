"""A run's logs: one JSON object per line, readable while written and after any crash.

`metrics.jsonl`, `eval.jsonl` and `dead_letters.jsonl` all go through here.  A process that dies in the
middle of a line leaves a torn tail; reading skips it, and the next writer removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class JsonLines:
    """Appends records to a file, one per line, handed to the operating system before `append` returns.

    path: created with its parent folders; a torn last line from an earlier process is removed.
    fsync: also wait until the line is on the disk.
    """

    def __init__(self, path: Path, *, fsync: bool = False) -> None:
        self.path = path
        self._fsync = fsync
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record.

        Raises:
            ValueError: when a number is not finite; names its key.
            TypeError: when a value has no JSON form; names its key.
        """
        line = json.dumps(_plain(record, ""), ensure_ascii=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            if self._fsync:
                os.fsync(file.fileno())


def read(path: Path) -> list[Line]:
    """All records of a log.  A missing file has none; a torn last line is left out.

    Raises:
        ValueError: when a line other than a torn last one is not a JSON object.
    """
    return [record for _, record in _lines(path)]


class Follower:
    """Reads what others append to a log, again and again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._at = 0, 0

    def read(self) -> tuple[list[Line], bool]:
        """Records that are new, and whether the log was cut back or replaced, so that they are all there are."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                cut = self._at > 0 and (stat.st_ino != self._inode or stat.st_size < self._at)
                self._inode, self._at = stat.st_ino, 0 if cut else self._at
                file.seek(self._at)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            cut, self._at = self._at > 0, 0
            return [], cut
        self._at += len(whole) + len(newline)
        return [record for raw in whole.split(b"\n") if (record := _parsed(raw)) is not None], cut


def cut_back(path: Path, keep: int | Callable[[Line], bool]) -> int:
    """Drop the records a resumed run is about to write again, and any torn last line; returns how many.

    The file is replaced atomically; kept lines stay as they are, byte for byte.

    keep: the last step to keep, or a predicate on the record.

    Raises:
        ValueError: when `keep` is a step and a record has none, or the log is damaged (see `read`).
    """
    lines = list(_lines(path))
    kept = [raw for raw, record in lines if _is_kept(path, record, keep)]
    content = b"".join(raw + b"\n" for raw in kept)
    if path.exists() and path.read_bytes() != content:
        replace_file(path, content)
    return len(lines) - len(kept)


def replace_file(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that readers see the old or the new content, never half of it.

    durable: also after a power failure, which takes a wait for the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, path)


def _is_kept(path: Path, record: Line, keep: int | Callable[[Line], bool]) -> bool:
    if not isinstance(keep, int):
        return keep(record)
    if "step" not in record:
        raise ValueError(f"{path}: a record without a step cannot be cut back: {record}")
    return bool(record["step"] <= keep)


def _lines(path: Path) -> Iterator[tuple[bytes, Line]]:
    """The raw bytes and the record of every whole line."""
    if not path.exists():
        return
    *whole, tail = path.read_bytes().split(b"\n")
    for number, raw in enumerate(whole, start=1):
        record = _parsed(raw)
        if record is None:
            raise ValueError(f"{path}, line {number}: not a JSON object: {raw[:80]!r}")
        yield raw, record
    # Without its newline the last line is torn, unless only the newline itself is missing.
    record = _parsed(tail)
    if record is not None:
        yield tail, record


def _mend(path: Path) -> None:
    """Make the file end with a whole line, so that the next one does not continue a torn one."""
    if not path.exists():
        return
    content = path.read_bytes()
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return
    replace_file(path, content + b"\n" if _parsed(tail) is not None else content[: -len(tail)])


def _parsed(raw: bytes) -> Line | None:
    try:
        record = json.loads(raw)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _plain(value: object, key: str) -> object:
    """The value in JSON's own types (numpy's numbers become Python's), refused where it has no such form."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{key} is {number}: only finite numbers are logged")
        return number
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, f"{key}.{name}" if key else str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{key}[{index}]") for index, inner in enumerate(value)]
    raise TypeError(f"{key} is a {type(value).__name__}, which a log line cannot hold")
