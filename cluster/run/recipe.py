"""How one worker of a run is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A worker's name, class and arguments, and what it asks of the cluster."""

    name: str
    kind: type
    args: tuple[Any, ...]
    cpus: float = 0.0
    gpus: float = 0.0
