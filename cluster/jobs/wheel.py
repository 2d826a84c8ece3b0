"""The installed project as a wheel, which a job carries to every node of a cluster.

Made from what is installed here, not from a working directory: nothing else travels, and changes of an editable
installation do.  It names no requirements: a node has the stack, or `musketeers doctor` says what it lacks, and
none must be downloaded when a job starts.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

PACKAGES = ("experts", "rollout", "rewards", "learner", "cluster")
DISTRIBUTION = "n-musketeers"
STAMP = (2020, 1, 1, 0, 0, 0)  # equal sources make equal wheels, and those are uploaded and installed once


def build(folder: Path) -> Path:
    """Writes the wheel into `folder` and returns its path.

    Its build tag is a hash of the contents, because Ray tells wheels apart by their names alone.
    """
    contents = dict(_sources())
    version = metadata(DISTRIBUTION)["Version"]
    info = f"n_musketeers-{version}.dist-info"
    digest = hashlib.sha256(b"".join(name.encode() + data for name, data in sorted(contents.items()))).hexdigest()
    tag = f"0{digest[:12]}"
    contents |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: musketeers\nRoot-Is-Purelib: true\nBuild: {tag}\nTag: py3-none-any\n"
        ).encode(),
        f"{info}/entry_points.txt": b"[console_scripts]\nmusketeers = cluster.cli:main\n",
    }
    contents[f"{info}/RECORD"] = _record(contents, f"{info}/RECORD")
    path = folder / f"n_musketeers-{version}-{tag}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in contents.items():
            wheel.writestr(zipfile.ZipInfo(name, STAMP), data, zipfile.ZIP_DEFLATED)
    return path


def _sources() -> Iterator[tuple[str, bytes]]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"the package {package} of {DISTRIBUTION} is not installed")
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package}/{path.relative_to(root)}", path.read_bytes()


def _record(contents: dict[str, bytes], own: str) -> bytes:
    """The list of files with their hashes that every wheel has."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for name, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow((name, f"sha256={digest}", len(data)))
    rows.writerow((own, "", ""))
    return text.getvalue().encode()
