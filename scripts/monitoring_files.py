"""Writes docs/monitoring/ from `cluster.watch.dashboards`; a test keeps the two equal."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from cluster.watch import dashboards


def files() -> dict[str, str]:
    """Name -> text."""
    return {
        "musketeers.json": json.dumps(dashboards.dashboard(), indent=1) + "\n",
        "alerts.yml": yaml.safe_dump(dashboards.alerts(), sort_keys=False, width=200),
    }


if __name__ == "__main__":
    folder = Path("docs/monitoring")
    folder.mkdir(exist_ok=True)
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")
