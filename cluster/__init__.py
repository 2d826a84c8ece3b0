"""Distributed training of a router over frozen language models, and using one: `from cluster import Musketeers`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.serve.local import Answer, Compared, Musketeers

__all__ = ["Answer", "Compared", "Musketeers"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: the command line must start without torch."""
    if name in __all__:
        from cluster.serve import local

        return getattr(local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
