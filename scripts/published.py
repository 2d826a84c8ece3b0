"""Finished runs as an archive beside the page that they made, for those who doubt it or go on with it.

Of each run it holds the settings, the verdict on every held-out answer, the summary, what its start cost, and step by
step rewards and operations: all that a comparison reads.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.config import ConfigError
from cluster.run.folder import RunFolder
from cluster.run.sweep import Point
from cluster.watch import logs
from cluster.watch.comparison import Run
from cluster.zoo import paths
from experts.loading import load_frozen, weights_sha256

WHOLE = ("config.yaml", "eval.jsonl", "summary.json")
BESIDES = ("start.json", "data.json")  # not written by older versions
CURVES = ("step", "reward", "operations")  # of metrics.jsonl
ROOT_LINE = re.compile(r"^root: .*$", re.MULTILINE)


def publish(target: Path, folders: Sequence[Path], note: Callable[[str], None]) -> bool:
    """Replaces the archive by one of these runs; leaves it as it is, with a word, where it holds others too."""
    kept = set(names(target)) - {folder.name for folder in folders}
    if kept:
        note(
            f"{target} also holds {len(kept)} runs that are not here ({min(kept)} is one) and stays as it is: "
            "--published takes them over; where the recipe has changed since, delete it"
        )
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    with tarfile.open(unfinished, "w:xz") as archive:
        for folder in sorted(folders):
            for name, text in _texts(folder).items():
                # Without the clock and the users of this machine: the same runs make the same file.
                member = tarfile.TarInfo(f"{folder.name}/{name}")
                member.size = len(content := text.encode())
                archive.addfile(member, io.BytesIO(content))
    os.replace(unfinished, target)
    return True


def restore(source: Path, points: Sequence[Point], note: Callable[[str], None]) -> None:
    """Puts the archive's runs where these are looked for; not over a folder, and none that had other settings."""
    missing = {point.config.run: point for point in points if not point.config.folder.exists()}
    wanted = missing.keys() & set(names(source))
    if not wanted:
        return
    root = missing[min(wanted)].config.folder.parent
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as box, tarfile.open(source) as archive:
        archive.extractall(box, [each for each in archive if each.name.split("/")[0] in wanted], filter="data")
        for name in sorted(wanted):
            here, point = Path(box) / name, missing[name]
            if differing := point.differing(RunFolder(here)):
                note(f"{name} was published with other settings ({', '.join(differing[:4])}): it is run again")
            else:
                here.rename(point.config.folder)


def same_models(runs: Sequence[Run]) -> None:
    """Refuses to go on from runs of other weights than the zoo has here, which is built if it is not there.

    Raises:
        ConfigError: before anything trains that could not be compared with them.
    """
    known = {each: digest for run in runs for each, digest in run.frozen.items() if paths.is_zoo(each)}
    for world in sorted(paths.worlds_named_by(each.partition(" in ")[0] for each in known)):
        paths.ensure(world)
    for each, digest in known.items():
        model, _, dtype = each.partition(" in ")
        if weights_sha256(load_frozen(str(paths.resolve(model)), dtype).model) != digest:
            raise ConfigError(
                f"{model} has other weights here than in the runs that have finished, as another kind of machine "
                "builds them: train all of them here (with another --root, without --published, the archive deleted)"
            )


def names(source: Path) -> list[str]:
    """The archive's runs; none where there is no archive."""
    if not source.is_file():
        return []
    with tarfile.open(source) as archive:
        return sorted({name.split("/")[0] for name in archive.getnames()})


def _texts(folder: Path) -> dict[str, str]:
    there = [*WHOLE, *(name for name in BESIDES if (folder / name).is_file())]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in there}
    texts["config.yaml"] = ROOT_LINE.sub("root: runs", texts["config.yaml"])
    lines = [
        {key: line[key] for key in line if key.partition("/")[0] in CURVES}
        for line in logs.read(folder / "metrics.jsonl")
    ]
    return texts | {"metrics.jsonl": "".join(f"{json.dumps(line)}\n" for line in lines)}
