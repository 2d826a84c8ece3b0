"""How a run is doing, as a small file in its folder, for `musketeers status` on any machine that sees the folder."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cluster.watch.logs import replace_file

NAME = "status.json"
STARTING = "starting the workers"


class StatusFile:
    """Writes every moment over the one before."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def starting(self, step: int, steps: int) -> None:
        """A run that has no driver yet: what the file said before was of another life."""
        moment = {
            "time": time.time(), "phase": STARTING, "step": step, "steps": steps, "running": 0, "waiting": 0,
            "oldest_running_s": 0.0, "oldest_waiting_s": 0.0, "dead": 0, "restarts": 0, "workers": [],
        }  # fmt: skip
        replace_file(self.path, json.dumps(moment).encode(), durable=False)

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
