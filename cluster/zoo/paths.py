"""Where zoo worlds lie, and whether what lies there is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from cluster.zoo.recipe import Recipe, ZooError, load_recipe, seed_of

MANIFEST = "zoo.json"
PREFIX = "zoo/"


def zoo_root() -> Path:
    """`MUSKETEERS_ZOO`, else ~/.cache/n-musketeers/zoo."""
    return Path(os.environ.get("MUSKETEERS_ZOO") or "~/.cache/n-musketeers/zoo").expanduser()


def world_folder(recipe: Recipe, root: Path | None = None) -> Path:
    """Where the world of this recipe lies, or will."""
    return (root or zoo_root()) / recipe.folder


def is_zoo(name: str) -> bool:
    """Whether a model's name in a configuration means a zoo model."""
    return name.startswith(PREFIX)


def worlds_named_by(names: Iterable[str]) -> set[str]:
    """The zoo worlds that some model names need; names of other models count for nothing.

    Raises:
        ZooError: when a zoo name is malformed, or its world or the model in it unknown.
    """
    return {_known(name)[0] for name in names if is_zoo(name)}


def resolve(name: str, root: Path | None = None) -> Path:
    """The folder of a zoo model such as `zoo/composed/policy` or `zoo/composed@1/policy`, its world's files checked.

    Raises:
        ZooError: when the name is wrong, the world is not built, or one of its files is missing,
            cut short or changed.
    """
    world, model = _known(name)
    folder = world_folder(load_recipe(world), root)
    check(folder, world)
    return folder / model


def ensure(world: str, root: Path | None = None) -> Path:
    """The world's folder, built first when it is not there.

    Raises:
        ZooError: when it cannot be built, or is there but damaged.
    """
    from cluster.zoo.build import build

    return build(world, root)


def is_built(folder: Path) -> bool:
    """Whether a world was built here to its end: the manifest is written last."""
    return (folder / MANIFEST).is_file()


def check(folder: Path, world: str) -> dict[str, Any]:
    """The manifest of a built world, after comparing every file with it.

    Raises:
        ZooError: when the world is not built, or one of its files is missing, cut short or changed.
    """
    if not is_built(folder):
        raise ZooError(f"zoo world {world!r} is not built ({folder}): run musketeers zoo build {world}")
    remedy = f"run musketeers zoo build {world} --force"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ZooError(f"zoo folder {folder} is cut short: its {MANIFEST} cannot be read: {remedy}") from error
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ZooError(f"zoo folder {folder} is incomplete: {name} is missing: {remedy}")
        stat = path.stat()
        if stat.st_size < entry["bytes"]:
            raise ZooError(
                f"zoo folder {folder} is cut short: {name} has {stat.st_size} of {entry['bytes']} bytes: {remedy}"
            )
        if sha256(path, stat.st_size, stat.st_mtime_ns) != entry["sha256"]:
            raise ZooError(f"zoo folder {folder} was changed: {name} is not what was built: {remedy}")
    return manifest


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    stat = path.stat()
    return {"bytes": stat.st_size, "sha256": sha256(path, stat.st_size, stat.st_mtime_ns)}


@lru_cache(maxsize=1024)
def sha256(path: Path, size: int, modified: int) -> str:
    """A file's hash, computed once while its size and time of change stay the same."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known(name: str) -> tuple[str, str]:
    """World and model of a name, which the world's recipe must have; the world need not be built."""
    world, model = _parts(name)
    known = [entry.name for entry in load_recipe(world).models]
    if model not in known:
        raise ZooError(f"zoo world {world!r} has no model {model!r}: it has {', '.join(known)}")
    return world, model


def _parts(name: str) -> tuple[str, str]:
    parts = name.split("/")
    if len(parts) != 3 or parts[0] != "zoo" or not all(parts):
        raise ZooError(f"{name!r} is no zoo model: write zoo/<world>/<model>, such as zoo/composed/policy")
    try:
        seed_of(parts[1])
    except ZooError as error:
        raise ZooError(f"{name!r}: {error}") from None
    return parts[1], parts[2]
