"""`module:Class` references in a configuration."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any


class PluginError(ValueError):
    """A `module:Class` reference that leads nowhere."""


def load_plugin(reference: str, key: str, kinds: Iterable[str]) -> Any:
    """The object a `module:Name` reference names.

    kinds: that are known by a name alone, for the message.

    Raises:
        PluginError: naming the configuration key, when the form is wrong or nothing is there.
    """
    module_name, _, name = reference.partition(":")
    if not module_name or not name:
        raise PluginError(f"{key}: {reference!r} is neither one of {', '.join(kinds)} nor of the form module:Class")
    try:
        return getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise PluginError(f"{key}: {reference!r}: no module named {error.name!r} can be imported") from error
    except AttributeError as error:
        raise PluginError(f"{key}: module {module_name!r} has no {name!r}") from error
