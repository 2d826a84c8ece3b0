"""The models of a run, where they are and how they get there: the zoo, the cache, a folder or the hub."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from cluster.config import ConfigError, RunConfig
from cluster.zoo import paths as zoo
from cluster.zoo.recipe import load_recipe
from experts import sources
from experts.loading import ModelError


def model_path(reference: str) -> str:
    """Where a configuration's model is: a folder of the zoo or of the cache, or the reference itself.

    Raises:
        ValueError: when it is not built, fetched or converted yet.
    """
    return str(zoo.resolve(reference)) if zoo.is_zoo(reference) else sources.resolve(reference)


def is_missing(reference: str) -> bool:
    """Whether a model is one that a run builds, fetches or converts by itself, and has not yet."""
    if zoo.is_zoo(reference):
        return any(not zoo.is_built(zoo.world_folder(load_recipe(w))) for w in zoo.worlds_named_by([reference]))
    return sources.belongs_to_cache(reference) and sources.find(reference) is None


def check_references(config: RunConfig) -> None:
    """Refuses names that no model can have; looks at no model.

    Raises:
        ValueError: one line, naming the key or the zoo's name.
    """
    for key, reference in config.models().items():
        if zoo.is_zoo(reference):
            zoo.worlds_named_by([reference])
        with _under(key):
            sources.check(reference)


def ensure_models(config: RunConfig, note: Callable[[str], None] = lambda text: None, accept: bool = False) -> None:
    """Builds zoo worlds, fetches packages and converts GGUF files that are missing.

    accept: the licences of all packages.

    Raises:
        ValueError: one line, naming what cannot be had and the remedy.
    """
    for world in sorted(zoo.worlds_named_by(config.models().values())):
        zoo.ensure(world)
    for key, reference in config.models().items():
        with _under(key):
            sources.ensure(reference, accept, note)


@contextlib.contextmanager
def _under(key: str) -> Iterator[None]:
    """Names the key that an error is about."""
    try:
        yield
    except ModelError as error:
        raise ConfigError(f"{key}: {error}") from error
