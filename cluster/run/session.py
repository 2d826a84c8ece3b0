"""One training run from start to end: prepare, start workers, measure, train, measure again, report."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cluster.config import RunConfig
from cluster.jobs import placement
from cluster.run import actors, checkpoint, substitution
from cluster.run.admission import Admission, Limits
from cluster.run.asked import asked_by
from cluster.run.baselines import KnownBaselines, fingerprints
from cluster.run.calls import Sink
from cluster.run.driver import Driver
from cluster.run.evaluate import Evaluation, Evaluator
from cluster.run.examples import examples
from cluster.run.fleet import Fleet
from cluster.run.folder import RunFolder
from cluster.run.learning import Learning
from cluster.run.masking import VerifierHealth
from cluster.run.monitor import Monitor, Outlet
from cluster.run.preflight import model_facts
from cluster.run.records import Records, baselines_of
from cluster.run.recovery import Recovery, unstarted
from cluster.run.start import Started, start_inline, start_on_ray
from cluster.run.starting import start_router
from cluster.run.substitution import Found
from cluster.watch.live import Plan, Watch, make_watch
from cluster.watch.message import JobMessage, own_job
from cluster.watch.statusfile import STARTING, StatusFile
from cluster.watch.telemetry import Telemetry
from cluster.watch.wandb_run import WandbRun
from experts.standins import write_stand_ins
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
        self.message: JobMessage | None = None

    async def run(self) -> Outcome:
        """The whole run; returns how it ended."""
        begun = time.perf_counter()
        resumed = None
        if checkpoint.steps(self.folder.checkpoints):
            resumed = checkpoint.read(self.folder.checkpoints, prompt=self.stream.prompt)
        StatusFile(self.folder.path).starting(resumed.step if resumed else 0, self.config.steps)
        with contextlib.ExitStack() as leaving:
            started = await self._start(leaving)
            started.fleet.asked = asked_by(self.config, self.tasks)
            leaving.callback(started.fleet.close)
            leaving.callback(self.watch.stop)
            try:
                if started.fleet.asked.what == "answers":
                    await started.fleet.prepare(answers=True)
                return await self._train(started, resumed, begun, leaving)
            except started.fleet.backend.errors as error:
                # While training and measuring, faults are dealt with; before that there is nothing to lose yet.
                raise await unstarted(error, started.fleet) from error

    async def _start(self, leaving: contextlib.ExitStack) -> Started:
        verifiers = {name: task.verifier for name, task in self.tasks.items()}
        if self.config.execution == "inline":
            return start_inline(self.config, verifiers)
        ray = self.config.ray
        info = actors.join_cluster(ray.address, ray.dashboard_port, self.config.run)
        leaving.callback(actors.leave_cluster)
        if info.dashboard_url:
            self.console.print(
                f"Ray dashboard: http://{info.dashboard_url}  (log in with the token in {info.token_path})",
                highlight=False,
            )
        if job := own_job():
            self.message = JobMessage(job)
            await self.message.say(STARTING)
        actors.check_places(self.config)
        self._check_placement()
        with self.console.status("starting the experts, the policy, the verifiers and the learner"):
            return await start_on_ray(self.config, verifiers, self.watch.note)

    def _check_placement(self) -> None:
        """The memory plan, where GPUs are asked for; one that cannot fit is refused before anything is allocated."""
        if not any((*(e.gpus for e in self.config.engines().values()), self.config.learner.gpus)):
            return
        wanted = placement.needs(self.config, model_facts(self.config))
        nodes = actors.gpu_nodes(self.config.ray.gpu_memory_gb)
        self.console.print(placement.table(wanted, nodes))
        placement.check(wanted, nodes)

    async def _train(
        self, started: Started, resumed: checkpoint.Checkpoint | None, begun: float, leaving: contextlib.ExitStack
    ) -> Outcome:
        fleet = started.fleet
        records = Records(self.config, self.folder, self.watch, started.shape)
        costs = None
        if resumed is None:
            costs = await start_router(self.config, started, self.stream, self.console)
        else:
            records.cut_back(resumed.step)
        driver = await make_driver(self.config, fleet, self.stream, records, self.watch.note, resumed)
        if costs is not None:
            await driver.save()
            # After it: a run that has logged anything has had a checkpoint, and without one it is not started anew.
            self.folder.write_start(costs)
        monitor = self._monitor(driver, records)
        leaving.callback(records.close)
        async with monitor.watching():
            outcome = await self._through(started, driver, records, monitor, begun)
            monitor.phase = "stopped" if outcome.stopped else "finished"
        return outcome

    def _monitor(self, driver: Driver, records: Records) -> Monitor:
        """Who is told how the run is doing, all along."""
        config = self.config
        if config.tracking.wandb:
            values = config.model_dump(mode="json")
            records.exports.append(WandbRun(config.tracking.wandb, config.run, self.folder.path, values))
        if config.execution == "inline":
            return Monitor(driver, [StatusFile(self.folder.path)], note=self.watch.note)
        telemetry = Telemetry(config.run, config.steps, config.max_staleness)
        records.exports.append(telemetry)
        outlets: list[Outlet] = [StatusFile(self.folder.path), telemetry]
        if self.message:
            self.message.reward = lambda: records.latest.get("reward/mean")
            outlets.append(self.message)
        return Monitor(driver, outlets, actors.whereabouts, note=self.watch.note)

    async def _through(
        self, started: Started, driver: Driver, records: Records, monitor: Monitor, begun: float
    ) -> Outcome:
        """Measures, trains and measures again."""
        again, fleet = driver.learning.again, started.fleet
        monitor.phase = "measuring the untrained router"
        known = KnownBaselines(self.config, self.tasks, fingerprints(started.experts, started.policy))
        evaluator = Evaluator(self.config, fleet, self.tasks, known)
        prompts = evaluator.prompts("test", self.config.evaluation.prompts)
        before = await again(lambda: self._before(evaluator, records, prompts, driver.learning.router))
        records.evaluator = evaluator
        self.watch.start(
            Plan(
                name=self.config.run,
                total_steps=self.config.steps,
                tasks=tuple(evaluator.tasks),
                experts=tuple(evaluator.experts),
                history=records.history(),
            )
        )
        if self.config.trains:
            monitor.phase = "training"
            with stop_on_signals(driver, self.watch):
                await driver.run()
        self.watch.stop()
        if self.config.trains and driver.step < self.config.steps:
            self.console.print(f"stopped at step {driver.step} with a checkpoint; go on with --resume", highlight=False)
            return Outcome(INTERRUPTED, True)
        monitor.phase = "measuring the trained router"
        after, attention = await again(lambda: self._after(evaluator, records, prompts, driver, before))
        frozen = await again(lambda: self._frozen(started))
        samples = await again(lambda: examples(self.config, fleet, self.stream, self.folder, driver.step))
        wall_s = time.perf_counter() - begun
        records.finish(driver, frozen, before, after, attention, wall_s, started, samples, self.console)
        try:
            monitor.phase = "looking for stand-ins"
            await self._stand_ins(evaluator, fleet, driver, records)
        finally:
            records.report(self.console)
        return Outcome(0, False)

    async def _before(self, evaluator: Evaluator, records: Records, prompts: list[Any], router: Any) -> Evaluation:
        """The untrained router and the frozen baselines; a resumed run has them in its log."""
        if known := records.before():
            return known
        with self.console.status("measuring the untrained router and the frozen baselines"):
            result, _ = await evaluator.router(prompts, router)
            before = {"router": result, **await evaluator.baselines(prompts, router)}
        records.evaluation(0, "before", prompts, before)
        return before

    async def _after(
        self, evaluator: Evaluator, records: Records, prompts: list[Any], driver: Driver, before: Evaluation
    ) -> tuple[Evaluation, dict[str, float]]:
        with self.console.status("measuring the trained router"):
            result, attention = await evaluator.router(prompts, driver.learning.router)
            after = {
                "router": result,
                "shuffled_within_task": await evaluator.shuffled(prompts, driver.learning.router, within_task=True),
                "shuffled": await evaluator.shuffled(prompts, driver.learning.router, within_task=False),
                **baselines_of(before),
            }
        records.evaluation(driver.step, "after", prompts, after, attention)
        return after, attention

    async def _stand_ins(self, evaluator: Evaluator, fleet: Fleet, driver: Driver, records: Records) -> None:
        """What is shown in the place of experts that may be away later, in the run's folder.

        The run is whole without it: what goes wrong is told, and no more.
        """
        candidates = self.config.evaluation.stand_ins
        if not candidates or not substitution.possible(evaluator):
            return

        async def search() -> tuple[Found, str]:
            router = driver.learning.router
            snapshot = await fleet.get(router, "the router")
            return await substitution.find(evaluator, fleet, router, candidates), snapshot.checksum

        try:
            with self.console.status("looking for what stands in for an expert that is away"):
                found, checksum = await driver.learning.again(search)
        except Exception as error:  # noqa: BLE001 - a router of one's own may refuse to be without an expert
            said = f"no stand-ins for experts that are away: {type(error).__name__}: {error}"
            remedy = f"`musketeers ablate {self.folder.path}` looks for them again"
            self.console.print(f"{said}; {remedy}", style="yellow", markup=False, highlight=False)
            return
        write_stand_ins(self.folder.path, checksum, found.stand_ins)
        records.stand_ins(found, self.console)

    async def _frozen(self, started: Started) -> list[dict[str, Any]]:
        """Proof that no frozen weight changed: every copy's hash before and after."""
        fleet = started.fleet
        handles = [*fleet.experts, *fleet.rollouts, *fleet.learners]
        hashes = await fleet.get_all([handle.call("sha256") for handle in handles], "hashing the frozen weights")
        return [
            {**started.frozen[handle.name], "worker": handle.name, "sha256_after": digest}
            for handle, digest in zip(handles, hashes, strict=True)
        ]


async def make_driver(
    config: RunConfig,
    fleet: Fleet,
    stream: PromptStream,
    sink: Sink,
    note: Callable[[str], None],
    resumed: checkpoint.Checkpoint | None = None,
) -> Driver:
    """A driver over a started fleet, at its beginning or where a checkpoint left it."""
    p = config.pipeline
    limits = Limits(p.open_groups, int(p.buffer_mb * 2**20), p.attempts)
    admission = Admission(config.learner.groups, config.max_staleness, config.steps, limits)
    incarnation = 0
    if resumed is not None:
        stream.restore(resumed.driver["stream"])
        admission.restore(resumed.driver["admission"])
        incarnation = resumed.learner.snapshot.incarnation + 1
        restored = [rank.call("restore", resumed.learner, incarnation) for rank in fleet.learners]
        await fleet.get_all(restored, "restoring the learner")
    recovery = Recovery(fleet, p.max_restarts, note, config.ray.warning_s)
    states = await fleet.get_all([rank.call("state") for rank in fleet.learners], "the learner's state")
    learning = Learning(fleet, recovery, config.max_staleness, states[0], incarnation)
    masked = VerifierHealth(config.rewards, note)
    driver = Driver(config, fleet, stream, admission, sink, recovery, learning, masked)
    if resumed is not None:
        driver.resume_with(resumed.finished)
        driver.elapsed_s, driver.samples = resumed.driver["elapsed_s"], resumed.driver["samples"]
        recovery.restore(resumed.driver["recovery"])
    return driver


@contextlib.contextmanager
def stop_on_signals(driver: Driver, watch: Watch) -> Iterator[None]:
    """Ctrl-C and SIGTERM finish the step in progress and write a checkpoint; a second Ctrl-C ends at once.

    A second SIGTERM does not: schedulers send several, and then wait before they kill.
    """
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        if driver.stop.is_set():
            if number == signal.SIGINT:
                sys.exit(INTERRUPTED)
            return
        watch.note("stopping after this step, with a checkpoint; press Ctrl-C again to end at once")
        driver.request_stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
