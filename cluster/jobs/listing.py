"""Jobs as a table for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime

from rich.table import Table
from rich.text import Text

from cluster.jobs.client import Job
from cluster.watch.panels import DASH, duration

STYLES = {"SUCCEEDED": "green", "FAILED": "bold red", "STOPPED": "yellow", "RUNNING": "bold #4cc9f0"}


def table(jobs: Sequence[Job]) -> Table:
    """One row a job; of a message of several lines the last one, which says how it ended."""
    shown = Table("run", "state", "started", "took", title=f"{len(jobs)} jobs" if jobs else "no jobs")
    shown.add_column("job", no_wrap=True)
    shown.add_column("message", overflow="fold")
    for job in jobs:
        took = (job.ended or time.time()) - job.started if job.started else None
        started = f"{datetime.fromtimestamp(job.started):%Y-%m-%d %H:%M}" if job.started else DASH
        lines = job.message.strip().splitlines() or [""]
        state = Text(job.status.lower(), style=STYLES.get(job.status, ""))
        shown.add_row(job.run, state, started, duration(took), job.id, Text(lines[-1]))
    return shown
