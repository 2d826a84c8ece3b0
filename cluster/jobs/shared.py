"""Places that every node of a cluster must see: made absolute before a job leaves, looked for once it is there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config import ConfigError, RunConfig, is_url
from cluster.run.hub import is_on_hub
from cluster.zoo import paths as zoo
from experts import sources


def absolute(config: RunConfig) -> RunConfig:
    """The configuration with every path of this machine written out, for a job that starts somewhere else."""
    values = config.model_dump(mode="json")
    if not is_url(values["root"]):
        values["root"] = _absolute(values["root"])
    for expert in values["experts"]:
        expert["model"] = _model(expert["model"])
    values["policy"]["model"] = _model(values["policy"]["model"])
    if values["router"]["init"] and not is_on_hub(values["router"]["init"]):
        values["router"]["init"] = _absolute(values["router"]["init"])
    for task in values["data"]["tasks"]:
        if task.get("path"):
            task["path"] = _absolute(task["path"])
    values["ray"]["address"] = None  # the job's own cluster
    for section, key in (("cache", "disk"), ("evaluation", "cache")):
        if (folder := values[section][key]) and not folder.startswith("~"):
            values[section][key] = _absolute(folder)
    if (system := values["data"]["system"]) and Path(system).expanduser().is_file():
        values["data"]["system"] = _absolute(system)
    return RunConfig.model_validate(values)


def digest_of(config: RunConfig) -> str:
    """A short hash that tells configurations apart."""
    return hashlib.sha256(config.as_yaml().encode()).hexdigest()[:12]


def places(config: RunConfig) -> dict[str, str]:
    """Configuration key -> folder that other nodes must see too: the runs', and those of local models.

    Runs at a URL need no folder: only their driver opens it, and does so before anything starts.
    """
    found = {} if is_url(config.root) else {"root": str(Path(config.root).expanduser().absolute())}
    for key, reference in config.models().items():
        if zoo.is_zoo(reference):
            found["the zoo (MUSKETEERS_ZOO)"] = str(zoo.zoo_root().absolute())
        elif sources.belongs_to_cache(reference):
            found["the cache of models (MUSKETEERS_MODELS)"] = str(sources.models_root().absolute())
        elif Path(reference).expanduser().exists():
            found[key] = str(Path(reference).expanduser().absolute())
    return found


@contextlib.contextmanager
def marked(root: str | None) -> Iterator[str]:
    """Leaves a file in the runs' folder for as long as nodes look for it: a folder of the same name may be another.

    The file's name; empty when there is no folder, or none that can be written here.
    """
    if root is None or (os.path.isdir(root) and not os.access(root, os.W_OK)):
        yield ""
        return
    Path(root).mkdir(parents=True, exist_ok=True)
    marker = Path(root) / f".seen-by-{secrets.token_hex(8)}"
    marker.touch()
    try:
        yield marker.name
    finally:
        marker.unlink()


@dataclass(frozen=True)
class Seen:
    """What one node said: keys of places that it does not see, and of those it cannot write.

    node: its address, for people; filled in by whoever asked.
    """

    node: str
    unseen: tuple[str, ...]
    unwritable: tuple[str, ...]


def check_shared(config: RunConfig, ask: Callable[..., Sequence[Seen]]) -> None:
    """Refuses places that some node of the cluster does not see; the run folder's root must be writable everywhere.

    Args:
        ask: runs `look` with the given arguments on every node.

    Raises:
        ConfigError: naming the key, the place and the node.
    """
    wanted = places(config)
    with marked(wanted.get("root")) as marker:
        answers = ask(wanted, marker)
    for seen in answers:
        for key in seen.unseen:
            raise ConfigError(
                f"{key}: {wanted[key]} is not the same folder on node {seen.node}: take one that all nodes share"
            )
        for key in seen.unwritable:
            raise ConfigError(f"{key}: {wanted[key]} cannot be written on node {seen.node}: mend its rights there")


def look(wanted: Mapping[str, str], marker: str) -> Seen:
    """Runs on a node: which of the places it does not see; `marker` is a file in the run folder's root."""
    unseen = [key for key, place in wanted.items() if not os.path.isdir(place)]
    if "root" not in wanted or "root" in unseen:
        return Seen("", tuple(unseen), ())
    if marker and not os.path.exists(os.path.join(wanted["root"], marker)):
        return Seen("", (*unseen, "root"), ())
    unwritable = [] if os.access(wanted["root"], os.W_OK) else ["root"]
    return Seen("", tuple(unseen), tuple(unwritable))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _model(reference: str) -> str:
    """A model's reference; a local folder or file is written out."""
    return _absolute(reference) if not zoo.is_zoo(reference) and Path(reference).expanduser().exists() else reference
