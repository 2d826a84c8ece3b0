"""How a run is doing, as a small file in its folder, for `musketeers status` on any machine that sees the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.watch.logs import replace_file

NAME = "status.json"


class StatusFile:
    """Writes every moment over the one before."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def now(self, moment: Any) -> None:
        """See `cluster.run.monitor.Outlet`."""
        replace_file(self.path, json.dumps(moment.as_dict()).encode(), durable=False)


def read(folder: Path) -> dict[str, Any]:
    """The newest moment; empty when there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / NAME).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found
