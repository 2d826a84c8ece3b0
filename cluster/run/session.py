"""One training run from start to end: prepare, start workers, measure, train, measure again, report."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import RunConfig
from cluster.run import actors, checkpoint
from cluster.run.admission import Admission
from cluster.run.driver import Driver
from cluster.run.evaluate import Evaluation, Evaluator
from cluster.run.folder import RunFolder
from cluster.run.records import Records, baselines_of
from cluster.run.start import Started, start_inline, start_on_ray
from cluster.watch.live import Plan, Watch, make_watch
from experts.state import load_router
from rewards.sources import Task
from rewards.stream import PromptStream

INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """How a run ended: an exit status, and whether it was stopped before its last step."""

    status: int
    stopped: bool


class Session:
    """Everything a run holds while it lasts."""

    def __init__(self, config: RunConfig, folder: RunFolder, tasks: Mapping[str, Task], console: Console) -> None:
        self.config, self.folder, self.tasks, self.console = config, folder, tasks, console
        self.watch: Watch = make_watch(console)
        self.stream = PromptStream(tasks, config.data)

    async def run(self) -> Outcome:
        """The whole run; returns how it ended."""
        begun = time.perf_counter()
        resumed = checkpoint.read(self.folder.checkpoints) if checkpoint.steps(self.folder.checkpoints) else None
        started = await self._start()
        try:
            return await self._train(started, resumed, begun)
        finally:
            self.watch.stop()
            started.fleet.close()
            if self.config.execution == "ray":
                actors.leave_cluster()

    async def _start(self) -> Started:
        verifiers = {name: task.verifier for name, task in self.tasks.items()}
        if self.config.execution == "inline":
            return start_inline(self.config, verifiers)
        ray = self.config.ray
        info = actors.join_cluster(ray.address, ray.dashboard_port, self.config.run)
        if info.dashboard_url:
            self.console.print(
                f"Ray dashboard: http://{info.dashboard_url}  (log in with the token in {info.token_path})",
                highlight=False,
            )
        try:
            with self.console.status("starting the experts, the policy, the verifiers and the learner"):
                return await start_on_ray(self.config, verifiers)
        except BaseException:
            actors.leave_cluster()
            raise

    async def _train(self, started: Started, resumed: checkpoint.Checkpoint | None, begun: float) -> Outcome:
        fleet, admission = (
            started.fleet,
            Admission(self.config.learner.groups, self.config.max_staleness, self.config.steps),
        )
        records = Records(self.config, self.folder, self.watch, started.shape)
        if resumed is not None:
            records.cut_back(resumed.step)
            self.stream.restore(resumed.driver["stream"])
            admission.restore(resumed.driver["admission"])
            incarnation = resumed.learner.snapshot.incarnation + 1
            await fleet.get_all(
                [rank.call("restore", resumed.learner, incarnation) for rank in fleet.learners], "restoring"
            )
        elif self.config.router.init:
            start = load_router(Path(self.config.router.init), started.shape, self.config.router)
            await fleet.get_all(
                [rank.call("start_from", start.arrays) for rank in fleet.learners], "loading router.init"
            )
        elif count := self.config.router.calibration.prompts:
            with self.console.status("looking at the experts' states"):
                prompts = [self.stream.prompt(ordinal) for ordinal in range(count)]
                arrays = fleet.learners[0].call("calibrate", *fleet.encode(prompts))
                await fleet.get_all([rank.call("start_from", arrays) for rank in fleet.learners], "calibrating")
        router = fleet.learners[0].call("snapshot")
        evaluator = Evaluator(self.config, fleet, self.tasks)
        prompts = evaluator.prompts("test", self.config.evaluation.prompts)
        before = await self._before(evaluator, records, prompts, router)
        records.evaluator = evaluator
        driver = Driver(self.config, fleet, self.stream, admission, records, router)
        if resumed is not None:
            driver.elapsed_s, driver.samples = resumed.driver["elapsed_s"], resumed.driver["samples"]
        else:
            await driver.save()
        self.watch.start(
            Plan(
                name=self.config.run,
                total_steps=self.config.steps,
                tasks=tuple(evaluator.tasks),
                experts=tuple(evaluator.experts),
                history=records.history(),
            )
        )
        with stop_on_signals(driver, self.watch):
            await driver.run()
        self.watch.stop()
        if driver.step < self.config.steps:
            self.console.print(f"stopped at step {driver.step} with a checkpoint; go on with --resume", highlight=False)
            return Outcome(INTERRUPTED, True)
        after, attention = await self._after(evaluator, records, prompts, driver, before)
        frozen = await self._frozen(started)
        records.finish(driver, frozen, before, after, attention, time.perf_counter() - begun, started, self.console)
        return Outcome(0, False)

    async def _before(self, evaluator: Evaluator, records: Records, prompts: list[Any], router: Any) -> Evaluation:
        """The untrained router and the frozen baselines; a resumed run has them in its log."""
        if known := records.before():
            return known
        with self.console.status("measuring the untrained router and the frozen baselines"):
            result, _ = await evaluator.router(prompts, router)
            before = {"router": result, **await evaluator.baselines(prompts, router)}
        records.evaluation(0, "before", before)
        return before

    async def _after(
        self, evaluator: Evaluator, records: Records, prompts: list[Any], driver: Driver, before: Evaluation
    ) -> tuple[Evaluation, dict[str, float]]:
        with self.console.status("measuring the trained router"):
            result, attention = await evaluator.router(prompts, driver.router)
            after = {
                "router": result,
                "shuffled_within_task": await evaluator.shuffled(prompts, driver.router, within_task=True),
                "shuffled": await evaluator.shuffled(prompts, driver.router, within_task=False),
                **baselines_of(before),
            }
        records.evaluation(driver.step, "after", after, attention)
        return after, attention

    async def _frozen(self, started: Started) -> list[dict[str, Any]]:
        """Proof that no frozen weight changed: every copy's hash before and after."""
        fleet = started.fleet
        handles = [*fleet.experts, *fleet.rollouts, *fleet.learners]
        hashes = await fleet.get_all([handle.call("sha256") for handle in handles], "hashing the frozen weights")
        before = [*started.experts, *([started.policy] * (len(fleet.rollouts) + len(fleet.learners)))]
        return [
            {
                "name": info["name"],
                "worker": handle.name,
                "parameters": info["parameters"],
                "sha256_before": info["sha256"],
                "sha256_after": digest,
            }
            for handle, info, digest in zip(handles, before, hashes, strict=True)
        ]


@contextlib.contextmanager
def stop_on_signals(driver: Driver, watch: Watch) -> Iterator[None]:
    """Ctrl-C and SIGTERM finish the step in progress and write a checkpoint; a second one ends at once."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if driver.stop.is_set():
            sys.exit(INTERRUPTED)
        watch.note("stopping after this step, with a checkpoint; press Ctrl-C again to end at once")
        driver.request_stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
