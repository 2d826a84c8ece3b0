"""Jobs of a Ray cluster through Ray's own job API: submit, list, read, stop."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import ConfigError, RunConfig
from cluster.jobs import wheel
from cluster.jobs.names import JOB_CONFIG, JOB_ID, JOB_OVERWRITE
from cluster.jobs.shared import absolute, digest_of
from cluster.run.environment import PROCESS_ENVIRONMENT
from cluster.zoo.paths import zoo_root
from experts import sources

T = TypeVar("T")

# A job that is told to stop finishes its step and writes a checkpoint; after this it is killed.
STOP_WAIT_S = 900
# Keys of a job's metadata; the first is what Ray's dashboard shows as its name.
RUN, CONFIGURATION = "job_name", "configuration"
# -P: nothing in the folder where a job happens to start shadows our packages.
ENTRYPOINT = "python -P -u -m cluster.jobs.entry"


class JobError(ValueError):
    """A request to the cluster's job server that failed; the message says what to do."""


@dataclass(frozen=True)
class Job:
    """A run's job as the cluster knows it.  started, ended: seconds since 1970, None when not yet."""

    id: str
    run: str
    status: str
    message: str
    configuration: str
    started: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        """Whether it has ended, well or badly."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Jobs:
    """The jobs of one cluster.

    address: of its dashboard (`http://host:8265`) or of Ray itself (`host:6379`); None takes RAY_API_SERVER_ADDRESS,
        RAY_ADDRESS, or the cluster that runs on this machine.

    Raises:
        JobError: when nothing answers there, or not without another token.
    """

    def __init__(self, address: str | None = None) -> None:
        if address:
            # Ray lets the environment win over an argument; what a person typed must win.
            os.environ["RAY_API_SERVER_ADDRESS"] = address
        use_token_if_there_is_one()
        from ray.job_submission import JobSubmissionClient

        self.address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
        self._client: Any = self._ask(lambda: JobSubmissionClient())

    def submit(
        self,
        config: RunConfig,
        overwrite: bool = False,
        environment: Sequence[str] = (),
        modules: Sequence[Path] = (),
    ) -> str:
        """Starts a run as a job and returns the job's id.  A run that was there before goes on.

        Args:
            environment: names of variables whose values here the job is to have.
            modules: packages' folders, or wheels, with the run's plug-ins.

        Raises:
            ConfigError: when a variable is not set, a module does not exist, or the run is under way already.
        """
        if missing := [name for name in environment if name not in os.environ]:
            raise ConfigError(f"--env {missing[0]}: this variable is not set here")
        ours = [name for name in environment if name in PROCESS_ENVIRONMENT or name.startswith(("RAY_", "MUSKETEERS_"))]
        if ours:
            raise ConfigError(f"--env {ours[0]}: the run sets this variable itself")
        if absent := [path for path in modules if not path.exists()]:
            raise ConfigError(f"--module {absent[0]}: there is no such folder or wheel")
        config = absolute(config)
        if busy := [job for job in self.list(config.run) if not job.over]:
            raise ConfigError(f"run {config.run!r} is under way as job {busy[0].id}: stop it, or give run=NAME")
        name = f"{config.run}-{datetime.now():%Y%m%d-%H%M%S}"
        variables = {
            JOB_ID: name,
            JOB_CONFIG: config.as_yaml(),
            JOB_OVERWRITE: str(int(overwrite)),
            "COLUMNS": "120",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
            **{key: os.environ[key] for key in environment},
        }
        if os.environ.get("MUSKETEERS_ZOO"):
            variables["MUSKETEERS_ZOO"] = str(zoo_root().absolute())
        if os.environ.get("MUSKETEERS_MODELS"):
            variables["MUSKETEERS_MODELS"] = str(sources.models_root().absolute())
        if os.environ.get(sources.ACCEPTED):
            variables[sources.ACCEPTED] = os.environ[sources.ACCEPTED]
        with tempfile.TemporaryDirectory() as folder:
            carried = [str(wheel.build(Path(folder))), *map(str, modules)]
            return self._ask(
                lambda: self._client.submit_job(
                    entrypoint=ENTRYPOINT,
                    submission_id=name,
                    runtime_env={"py_modules": carried, "env_vars": variables},
                    metadata={RUN: config.run, CONFIGURATION: digest_of(config)},
                )
            )

    def under_way(self, config: RunConfig) -> Job | None:
        """The job that this very run is under way as, if it is.

        Raises:
            ConfigError: when that job's run has this name and another configuration.
        """
        for job in self.list(config.run):
            if not job.over and job.configuration != digest_of(absolute(config)):
                raise ConfigError(f"job {job.id} is another run named {config.run!r}: stop it, or give run=NAME")
            if not job.over:
                return job
        return None

    def list(self, run: str | None = None) -> list[Job]:
        """Jobs of runs, the newest first; those of one run when it is named."""
        found = []
        for details in self._ask(self._client.list_jobs):
            metadata: Mapping[str, str] = details.metadata or {}
            if details.submission_id is None or CONFIGURATION not in metadata:
                continue
            found.append(
                Job(
                    id=details.submission_id,
                    run=metadata.get(RUN, ""),
                    status=str(getattr(details.status, "value", details.status)),
                    message=details.message or "",
                    configuration=metadata[CONFIGURATION],
                    started=details.start_time / 1000 if details.start_time else None,
                    ended=details.end_time / 1000 if details.end_time else None,
                )
            )
        newest = sorted(found, key=lambda job: (job.started or 0.0, job.id), reverse=True)
        return [job for job in newest if run in (None, job.run)]

    def find(self, name: str) -> Job:
        """The job of this id, or the newest job of the run of this name.

        Raises:
            ConfigError: when there is none.
        """
        jobs = self.list()
        for job in (*[j for j in jobs if j.id == name], *[j for j in jobs if j.run == name]):
            return job
        known = f"it has {', '.join(job.id for job in jobs[:5])}" if jobs else "it has none"
        raise ConfigError(f"the cluster at {self.address} has no job or run {name!r}: {known}")

    def logs(self, job: Job) -> str:
        """Everything a job has printed."""
        return str(self._ask(lambda: self._client.get_job_logs(job.id)))

    def follow(self, job: Job, show: Callable[[str], None]) -> Job:
        """Shows what a job prints until it ends; returns the job as it ended."""

        async def tail() -> None:
            lines: AsyncIterator[str] = self._client.tail_job_logs(job.id)
            async for text in lines:
                show(text)

        self._ask(lambda: asyncio.run(tail()))
        return self.ended(job)

    def ended(self, job: Job, limit_s: float = 60.0) -> Job:
        """The job once its end is known: its log may close a moment before.  limit_s: of the wait."""
        deadline = time.monotonic() + limit_s
        while not (now := self.find(job.id)).over and time.monotonic() < deadline:
            time.sleep(0.5)
        return now

    def stop(self, job: Job) -> bool:
        """Asks a job to stop with a checkpoint; False when it had ended already."""
        return bool(self._ask(lambda: self._client.stop_job(job.id)))

    def _ask(self, request: Callable[[], T]) -> T:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return request()
        except AuthenticationError as error:
            reason = str(error).splitlines()[0].split(". ")[0]
            raise JobError(
                f"the cluster at {self.address} wants its token ({reason}): set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own (on the head node: ray get-auth-token)"
            ) from error
        except BrokenPipeError:  # our own output's reader is gone
            raise
        except (ConnectionError, RuntimeError, ValueError, requests.RequestException, aiohttp.ClientError) as error:
            if self.address == "auto" and isinstance(error, ConnectionError):
                raise JobError(
                    "no Ray cluster runs on this machine: name one with --address http://HOST:8265, or start one with "
                    "ray start --head"
                ) from error
            raise JobError(
                f"the job server of the cluster at {self.address} does not do that: {_first_line(error)}; is Ray "
                "started there, with its dashboard?"
            ) from error


def use_token_if_there_is_one() -> None:
    """Ray's clients send no token unless told to; with one at hand there is no reason not to."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or path.is_file():
        os.environ["RAY_AUTH_MODE"] = "token"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
