"""The only module that knows the Hugging Face hub: bundles go up and come down, with the user's own login."""

from __future__ import annotations

import re
from pathlib import Path

SCHEME = "hub:"


class HubError(ValueError):
    """Something the hub does not have, or does not let us do; the message says what to do."""


def is_on_hub(place: str | Path) -> bool:
    """Whether a place is on the hub, and not on this machine."""
    return str(place).startswith(SCHEME)


def folder_of(place: str | Path) -> Path:
    """The folder of a place on this machine: of `hub:USER/NAME[@REVISION]`, a copy that is downloaded first.

    Raises:
        HubError: when it cannot be had.
    """
    if not is_on_hub(place):
        return Path(place).expanduser()
    return download(str(place))


def download(place: str) -> Path:
    """Downloads a bundle, or finds it in the hub's cache."""
    from huggingface_hub import snapshot_download

    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:@(.+))?", place)
    if not match:
        raise HubError(f"{place!r} is not of the form hub:USER/NAME or hub:USER/NAME@REVISION")
    return Path(snapshot_download(match[1], revision=match[2]))
