"""Our own training steps, timed: the real workers, loop and records, without any evaluation."""

from __future__ import annotations

import asyncio
import io
import time
from itertools import pairwise
from typing import Any

from rich.console import Console

from benchmarks.job import Job
from cluster.config import RunConfig, load
from cluster.run import actors
from cluster.run.driver import Driver
from cluster.run.folder import RunFolder
from cluster.run.records import Records
from cluster.run.session import make_driver
from cluster.run.start import Started, start_inline, start_on_ray
from cluster.watch.live import Plan, make_watch
from learner.engine import free_port
from rewards.sources import Task, build_tasks
from rewards.stream import PromptStream

STAGES = ("encode", "rollout", "reward", "learner")


class TimedRecords(Records):
    """A run's records, as always, and when each of them came."""

    def begin(self, driver: Driver, job: Job) -> None:
        """Starts the clock."""
        self._driver, self._job = driver, job
        self.arrivals = [time.perf_counter()]
        self.seen: list[dict[str, Any]] = []

    def step(self, record: dict[str, Any]) -> None:
        """See `Records.step`."""
        self.arrivals.append(time.perf_counter())
        self.seen.append(record)
        super().step(record)
        if self._job.out_of_time:
            self._driver.request_stop()

    def times(self) -> list[dict[str, float]]:
        """Seconds by stage for every step."""
        return [
            stage_times(record, end - start)
            for record, (start, end) in zip(self.seen, pairwise(self.arrivals), strict=True)
        ]


def stage_times(record: dict[str, Any], step_s: float) -> dict[str, float]:
    """A step's seconds by stage; `rest` is what no stage accounts for."""
    stages = {stage: record[f"time/{stage}_s"] for stage in STAGES}
    return {**stages, "rest": step_s - sum(stages.values()), "step": step_s}


def configuration(job: Job) -> RunConfig:
    """The job's configuration: in its own folder, without evaluations and checkpoints on the way."""
    execution = "inline" if job.system == "inline" else "ray"
    mine = [
        "run=benchmark",
        f"root={job.folder}",
        f"execution={execution}",
        f"steps={job.warmup + job.steps}",
        "evaluation.every=0",
        f"checkpoint.every={10**9}",
    ]
    return load(job.config, [*job.overrides, *mine])


async def start(config: RunConfig, tasks: dict[str, Task]) -> Started:
    """The run's workers; Ray's dashboard takes any free port."""
    verifiers = {name: task.verifier for name, task in tasks.items()}
    if config.execution == "inline":
        return start_inline(config, verifiers)
    actors.join_cluster(config.ray.address, free_port(), config.run)
    return await start_on_ray(config, verifiers)


async def measure(job: Job) -> None:
    """Trains, and writes the answer."""
    config = configuration(job)
    folder = RunFolder(config.folder)
    folder.prepare(config, overwrite=True)
    tasks = build_tasks(config.data)
    started = await start(config, tasks)
    try:
        watch = make_watch(Console(file=io.StringIO()))
        records = TimedRecords(config, folder, watch, started.shape)
        driver = await make_driver(config, started.fleet, PromptStream(tasks, config.data), records, watch.note)
        experts = tuple(expert.name for expert in config.experts)
        watch.start(Plan(name=config.run, total_steps=config.steps, tasks=tuple(tasks), experts=experts))
        records.begin(driver, job)
        await driver.run()
        job.finish(config.learner.groups * config.sampling.samples, records.times())
    finally:
        started.fleet.close()
        if config.execution == "ray":
            actors.leave_cluster()


if __name__ == "__main__":
    asyncio.run(measure(Job.from_command_line()))
