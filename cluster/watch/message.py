"""A run's state as its job's message, which Ray's dashboard and `musketeers jobs` show beside the job's name."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

EVERY_S = 5.0


class JobMessage:
    """Tells the cluster about a job, every few seconds.

    job: its submission id.
    reward: gives the newest reward, None before the first step.
    """

    def __init__(self, job: str) -> None:
        self.job = job
        self.reward: Callable[[], float | None] = lambda: None
        self._last, self._sending = 0.0, set[asyncio.Task[None]]()

    def now(self, moment: Any) -> None:
        """See `cluster.run.monitor.Outlet`; what does not get through is left to the next time."""
        if time.monotonic() - self._last < EVERY_S or self._sending:
            return
        self._last = time.monotonic()
        task = asyncio.ensure_future(self._send(text_of(moment, self.reward())))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def say(self, text: str) -> None:
        """Something that is no moment, such as what a start waits for."""
        await self._send(text)

    async def _send(self, text: str) -> None:
        # Ray has no public call for this; its own job manager writes the message the same way.  While the job runs
        # nobody else writes there: its end is recorded after this process is gone.
        from ray._private.worker import global_worker
        from ray.dashboard.modules.job.common import JobInfoStorageClient
        from ray.exceptions import RayError

        store = JobInfoStorageClient(global_worker.gcs_client)
        try:
            info = await store.get_info(self.job, timeout=5)
            if info is not None and not info.status.is_terminal():
                await store.put_info(self.job, replace(info, message=text), timeout=5)
        except (RayError, OSError, TimeoutError):
            return


def own_job() -> str | None:
    """The submission id of the job that this process is the driver of, None when it is not one."""
    try:
        said = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))
        return str(said["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None


def text_of(moment: Any, reward: float | None) -> str:
    """One line."""
    parts = [f"{moment.phase}: step {moment.step}/{moment.steps}"]
    if reward is not None:
        parts.append(f"reward {reward:.3f}")
    starting = [worker.name for worker in moment.workers if worker.state == "starting"]
    if starting:
        parts.append(f"starting again: {', '.join(starting)}")
    if moment.restarts:
        parts.append(f"{moment.restarts} restarts")
    if moment.dead:
        parts.append(f"{moment.dead} prompts given up")
    return ", ".join(parts)
