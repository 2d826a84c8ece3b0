"""A run's metrics in Weights & Biases, beside TensorBoard.  Off unless `tracking.wandb` names a project.

W&B's own variables apply (`WANDB_MODE=offline` keeps everything in the run's folder, `WANDB_API_KEY` logs in); a job
gets them with `musketeers submit --env`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import ConfigError

ID = "wandb-id"


def check() -> None:
    """Refuses a configuration that wants W&B where it is not installed, or not logged in.

    Raises:
        ConfigError: with the remedy.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("tracking.wandb: Weights & Biases is not installed: run pip install wandb, or leave it out")
    offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
    if not offline and not os.environ.get("WANDB_API_KEY") and not Path("~/.netrc").expanduser().is_file():
        raise ConfigError(
            "tracking.wandb: nobody is logged in to Weights & Biases: run wandb login, set WANDB_API_KEY (a job gets "
            "it with --env WANDB_API_KEY), or WANDB_MODE=offline"
        )


class WandbRun:
    """Sends one run's steps.

    project: of W&B.  config: the run's, shown beside its curves.
    A run that is resumed goes on with its curves: the id lies in its folder.
    """

    def __init__(self, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            self._run = self._begun(wandb, project, name, folder, config)
        except wandb.errors.Error as error:
            raise ConfigError(f"tracking.wandb: {project}: {error}") from error
        (folder / ID).write_text(self._run.id)

    def _begun(self, wandb: Any, project: str, name: str, folder: Path, config: Mapping[str, Any]) -> Any:
        known = folder / ID
        return wandb.init(
            project=project,
            name=name,
            id=known.read_text().strip() if known.is_file() else None,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            # Metrics only: no source code, no console, no facts about the machine.
            settings=wandb.Settings(
                console="off", disable_code=True, disable_git=True, save_code=False, x_disable_meta=True,
                x_disable_stats=True, silent=True,
            ),
        )  # fmt: skip

    def step(self, record: Mapping[str, Any]) -> None:
        """See `cluster.run.records.Export`."""
        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Waits until everything is written or sent."""
        self._run.finish()
