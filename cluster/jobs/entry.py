"""What runs on the cluster when a job starts: the same `train`, with the configuration that the job carries."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from cluster.cli import console
from cluster.config import ConfigError, parse
from cluster.jobs.names import JOB_CONFIG, JOB_ID, JOB_OVERWRITE
from cluster.run.guarded import guarded


def run() -> None:
    """Trains, or goes on with a run that was there before, and ends the process."""
    from cluster.run.training import started_before, train

    text = os.environ.get(JOB_CONFIG)
    if text is None:
        raise ConfigError(f"{JOB_CONFIG} is not set: jobs are started with musketeers submit")
    config = parse(yaml.safe_load(text), JOB_CONFIG)
    overwrite = os.environ.get(JOB_OVERWRITE) == "1"
    resume = not overwrite and started_before(config)
    said = "goes on" if resume else "starts"
    console.print(
        f"job {os.environ.get(JOB_ID, '?')}: run {config.run} {said} in {config.folder}, "
        f"n-musketeers {version('n-musketeers')} from {Path(__file__).parents[2]}",
        highlight=False,
        soft_wrap=True,
    )
    sys.exit(train(config, resume, overwrite, console))


if __name__ == "__main__":
    guarded(run)
