"""The training loop: two coroutines, continuous rollouts and continuous training, around one admission state.

Prompts flow as references from worker to worker; the router is the only thing that flows back.
With `max_staleness: 0` the same loop is synchronous training.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.config import RunConfig
from cluster.run.admission import Admission
from cluster.run.fleet import Fleet, Reference
from cluster.run.metrics import StepTimes, step_metrics
from cluster.run.scoring import GroupReport, WaveReport
from learner.gradient import Sums
from learner.learner import LearnerState, UpdateResult
from rewards.stream import PromptStream
from rollout.types import Group, Sampling


@dataclass(frozen=True)
class Wave:
    """Some prompts on their way together: references to their scored rollout and features, and the report."""

    rollout: Reference
    features: list[Reference]
    report: WaveReport


class Sink(Protocol):
    """What becomes of a run's records; the driver itself writes nothing."""

    def step(self, record: dict[str, Any]) -> None:
        """One finished step."""
        ...

    def groups(self, step: int, groups: list[Group]) -> None:
        """The groups of a step, only when `wants_groups`."""
        ...

    def checkpoint(self, step: int, learner: LearnerState, driver: dict[str, Any]) -> None:
        """Everything needed to go on from here."""
        ...

    async def validate(self, step: int, router: Reference) -> None:
        """A look at validation prompts, when one is due."""
        ...


class Driver:
    """One run's loop.  `stop` may be set from outside: the step in progress is finished first."""

    def __init__(
        self, config: RunConfig, fleet: Fleet, stream: PromptStream, admission: Admission, sink: Sink, router: Reference
    ) -> None:
        self.config, self.fleet, self.stream, self.admission, self.sink = config, fleet, stream, admission, sink
        self.router = router
        self.stop = asyncio.Event()
        self._wake: asyncio.Future[None] | None = None
        self.elapsed_s, self.samples = 0.0, 0
        self._waves: dict[int, Wave] = {}
        self._fresh: list[WaveReport] = []
        self._changed = asyncio.Condition()
        sampling = config.sampling
        self._sampling = Sampling(
            temperature=sampling.temperature, max_new_tokens=sampling.max_new_tokens, samples=sampling.samples
        )

    def request_stop(self) -> None:
        """Ends the run after the step in progress; call from the loop's own thread."""
        self.stop.set()
        self._wake = asyncio.ensure_future(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    @property
    def step(self) -> int:
        """Updates done."""
        return self.admission.version

    async def run(self) -> None:
        """Trains until the configured number of steps, or until `stop` is set."""
        async with asyncio.TaskGroup() as tasks:
            rollouts = tasks.create_task(self._rollouts())
            await self._training()
            rollouts.cancel()

    async def _rollouts(self) -> None:
        """Starts a wave on every rollout worker whenever admission has room."""
        size = self.config.learner.groups // self.config.policy.workers
        async with asyncio.TaskGroup() as waves:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self.admission.capacity >= size)
                for worker in range(self.config.policy.workers):
                    if ordinals := self.admission.issue(size):
                        waves.create_task(self._wave(ordinals, worker))

    async def _wave(self, ordinals: list[int], worker: int) -> None:
        prompts = [self.stream.prompt(ordinal) for ordinal in ordinals]
        features = self.fleet.encode(prompts)
        rollout = self.fleet.rollouts[worker].call("generate", prompts, self._sampling, self.router, *features)
        verifier = self.fleet.rewards[worker % len(self.fleet.rewards)]
        scored, report_ref = verifier.call("score", rollout, returns=2)
        report = await self.fleet.get(report_ref, f"rollout and rewards of prompts {ordinals[0]} to {ordinals[-1]}")
        wave = Wave(scored, features, report)
        self._fresh.append(report)
        async with self._changed:
            self._waves.update(dict.fromkeys(ordinals, wave))
            self.admission.finish(ordinals)
            self._changed.notify_all()

    async def _training(self) -> None:
        """Forms batches as they become ready and updates the router."""
        started, last = time.perf_counter(), time.perf_counter()
        before = self.elapsed_s
        while self.step < self.config.steps and not self.stop.is_set():
            batch = await self._next_batch()
            if batch is None:
                break
            record = await self._update(batch, last)
            last = time.perf_counter()
            self.elapsed_s = before + last - started
            self.sink.step(record)
            if self.step % self.config.checkpoint.every == 0 or self.step == self.config.steps:
                await self.save()
            await self.sink.validate(self.step, self.router)
        if self.step % self.config.checkpoint.every and self.step < self.config.steps:
            await self.save()

    async def _next_batch(self) -> list[int] | None:
        ready: Callable[[], bool] = lambda: self.stop.is_set() or self.admission.batch() is not None  # noqa: E731
        async with self._changed:
            await self._changed.wait_for(ready)
        return None if self.stop.is_set() else self.admission.batch()

    async def _update(self, batch: list[int], last: float) -> dict[str, Any]:
        version, start = self.step, time.perf_counter()
        waves = list({id(self._waves[o]): self._waves[o] for o in batch}.values())
        parts = [w.rollout for w in waves] + [f for w in waves for f in w.features]
        updates = [rank.call("update", batch, len(waves), *parts) for rank in self.fleet.learners]
        router = self.fleet.learners[0].call("snapshot")
        results: list[UpdateResult] = await self.fleet.get_all(updates, "the learner's update")
        learner_s = time.perf_counter() - start
        self.router = router
        if self.config.checkpoint.groups:
            await self._keep_groups(version + 1, batch, waves)
        by_ordinal = {group.ordinal: group for wave in waves for group in wave.report.groups}
        groups = [by_ordinal[ordinal] for ordinal in batch]
        self.samples += sum(len(group.statuses) for group in groups)
        metrics = self._metrics(groups, results, version, StepTimes(time.perf_counter() - last, learner_s))
        async with self._changed:
            for ordinal in batch:
                del self._waves[ordinal]
            self.admission.train(batch)
            self._changed.notify_all()
        return {"step": version + 1, "ordinals": batch, **metrics}

    def _metrics(
        self, groups: list[GroupReport], results: list[UpdateResult], version: int, times: StepTimes
    ) -> dict[str, float]:
        learner = Sums.merged([r.sums for r in results]), results[0].grad_norm
        fresh, self._fresh = self._fresh, []
        return step_metrics(fresh, groups, [e.name for e in self.config.experts], version, learner, times)

    async def _keep_groups(self, step: int, batch: list[int], waves: list[Wave]) -> None:
        rollouts = await self.fleet.get_all([wave.rollout for wave in waves], "the step's groups")
        wanted = set(batch)
        kept = [group for rollout in rollouts for group in rollout.groups if group.ordinal in wanted]
        self.sink.groups(step, sorted(kept, key=lambda group: group.ordinal))

    async def save(self) -> None:
        """Writes a checkpoint of this moment."""
        states = await self.fleet.get_all([rank.call("state") for rank in self.fleet.learners], "the learner's state")
        driver = {
            "admission": self.admission.state(),
            "stream": self.stream.state(),
            "elapsed_s": self.elapsed_s,
            "samples": self.samples,
        }
        self.sink.checkpoint(self.step, states[0], driver)
