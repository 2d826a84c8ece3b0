"""Updates on the learner's ranks, and everything that another learner would need to go on from the last one.

That is kept in the driver's process after every update, so a dead rank, or its whole node, costs at most
the step in progress.  The optimizer's state arrives there while the next rollouts already run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster.run.fleet import Fault, Fleet, Reference, Stage, StuckError
from cluster.run.recovery import Recovery, RunError
from cluster.run.start import join_ranks
from cluster.run.watchdog import ALIVE_S
from experts.state import RouterSnapshot
from learner.engine import OptimizerState
from learner.learner import LearnerState, UpdateResult

T = TypeVar("T")


class LostGroupsError(RuntimeError):
    """The data of a batch cannot be reached any more."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass(frozen=True)
class Job:
    """What `LearnerRank.update` takes."""

    batch: Sequence[int]
    parts: Sequence[Reference]


@dataclass(frozen=True)
class Done:
    """An update that was done; its optimizer state, one reference a rank, may still be on its way."""

    job: Job
    router: Reference
    snapshot: RouterSnapshot
    moments: list[Reference]


class Learning:
    """The learner as the driver sees it.  `router` is the current one, as one object that all workers read.

    state: of the ranks now; incarnation: which life of the learner they are.
    """

    def __init__(
        self, fleet: Fleet, recovery: Recovery, max_staleness: int, state: LearnerState, incarnation: int = 0
    ) -> None:
        self.fleet, self.recovery, self.max_staleness = fleet, recovery, max_staleness
        self.router: Reference = fleet.backend.put(state.snapshot)
        self._kept, self._incarnation = state, incarnation
        self._unsettled: Done | None = None
        self._arriving: asyncio.Task[None] | None = None

    async def update(self, batch: Sequence[int], parts: Sequence[Reference]) -> list[UpdateResult]:
        """One update; what each rank says of it.  A learner that dies over it is built again and repeats it.

        Args:
            parts: as for `LearnerRank.update`.

        Raises:
            LostGroupsError: when the groups themselves are gone.
            RunError: when the learner keeps dying.
        """
        await self._settle()
        job = Job(batch, parts)
        while True:
            stages: list[Stage] = []
            try:
                results, done = await self._run(job, stages)
            except self.fleet.backend.errors as error:
                fault = await self._rebuilt_after(error, stages)
                if not self._is_of_learner(fault):
                    raise LostGroupsError(fault) from error
                continue
            self.recovery.succeeded(self.fleet.learners)
            self.router, self._unsettled = done.router, done
            self._arriving = asyncio.create_task(self._arrive(done))
            return results

    async def again(self, make: Callable[[], Awaitable[T]]) -> T:
        """Does something outside training that needs the fleet, until it succeeds: evaluations, the last hashes."""
        while True:
            try:
                async with self.recovery.watchdog.watching():
                    await self._settle()
                    return await make()
            except self.fleet.backend.errors as error:
                fault = await self.recovery.after(error)
                if fault.who in self.fleet.learners:
                    await self.rebuild(fault)
                elif fault.kind == "lost":
                    self.publish()

    async def state(self) -> LearnerState:
        """Everything a checkpoint needs of the learner."""
        await self._settle()
        if not self.fleet.backend.survives:
            self._kept = await self.fleet.get(self.fleet.learners[0].call("state"), "the learner's state")
        return self._kept

    def publish(self) -> None:
        """Makes the current router one object again: the one before may have been lost with its node."""
        newest = self._unsettled.snapshot if self._unsettled else self._kept.snapshot
        self.router = self.fleet.backend.put(newest)

    async def _run(self, job: Job, stages: list[Stage]) -> tuple[list[UpdateResult], Done]:
        ranks = self.fleet.learners
        updates = [rank.call("update", job.batch, *job.parts) for rank in ranks]
        stages += [Stage.of(rank, update) for rank, update in zip(ranks, updates, strict=True)]
        router = ranks[0].call("snapshot")
        moments = [rank.call("moments") for rank in ranks] if self.fleet.backend.survives else []
        what = f"update {self._kept.snapshot.version + 1}"
        results: list[UpdateResult] = await self.fleet.get_all(updates, what, stages=stages)
        snapshot = await self.fleet.get(router, "the new router", stages=[Stage.of(ranks[0], router)])
        if snapshot.version != (expected := self._kept.snapshot.version + 1):
            raise RunError(f"the learner published router {snapshot.version} after update {expected}")
        return results, Done(job, router, snapshot, moments)

    async def _arrive(self, done: Done) -> None:
        """Takes over an update's optimizer state, and lets go of what the update was made from."""
        optimizer = self._kept.optimizer
        if done.moments:
            optimizer = await self._moments(done)
        self._kept, self._unsettled = self._after(done, optimizer), None

    async def _moments(self, done: Done) -> OptimizerState:
        stages = [Stage.of(rank, moments) for rank, moments in zip(self.fleet.learners, done.moments, strict=True)]
        return await self.fleet.get(done.moments[0], "the optimizer's state", stages=stages)

    async def _settle(self) -> None:
        """Waits until the last update's optimizer state is here."""
        if self._arriving is None:
            return
        try:
            await asyncio.shield(self._arriving)  # who stops waiting must not stop it
        except self.fleet.backend.errors as error:
            if (done := self._unsettled) is not None:
                optimizer = await self._repeated(done, error)
                self._kept, self._unsettled = self._after(done, optimizer), None
        self._arriving = None

    async def _repeated(self, done: Done, error: Exception) -> OptimizerState:
        """The optimizer's state after an update whose learner died before it was handed over: the update runs again.

        Rollouts may already use the router that it published, so that one stays as it is, to the last bit.
        """
        stages = [Stage.of(rank, moments) for rank, moments in zip(self.fleet.learners, done.moments, strict=True)]
        groups_lost = False
        while True:
            fault = await self._rebuilt_after(error, stages)
            groups_lost = groups_lost or not self._is_of_learner(fault)
            stages, optimizer = [], self._kept.optimizer
            try:
                if groups_lost:
                    self.recovery.note("the optimizer goes on from its state one step before")
                else:
                    _, again = await self._run(done.job, stages)
                    optimizer = await self._moments(again)
                await self._restore(self._after(done, optimizer))
                return optimizer
            except self.fleet.backend.errors as failed:
                error = failed

    def _is_of_learner(self, fault: Fault) -> bool:
        """Whether a learner's process failed, and not what it was given."""
        return fault.kind != "lost" and fault.worker in ("", *(rank.name for rank in self.fleet.learners))

    def _after(self, done: Done, optimizer: OptimizerState) -> LearnerState:
        version = done.snapshot.version
        kept = {v: s for v, s in self._kept.history.items() if v >= version - self.max_staleness}
        return LearnerState(done.snapshot, optimizer, {**kept, version: done.snapshot}, self._kept.initial)

    async def _rebuilt_after(self, error: Exception, stages: Sequence[Stage]) -> Fault:
        """Builds the learner again after a failed call, unless what it was given failed.

        Raises:
            RunError: when the learner keeps failing, or when its code raised.
        """
        fault = await self.recovery.after(error, stages)
        if fault.kind == "raised" and not await self._a_rank_is_gone():
            raise self.recovery.hopeless(fault) from error
        # What is lost to one rank may not be to another, which then waits for it in the update.
        if fault.kind == "lost" or self._is_of_learner(fault):
            await self.rebuild(fault)
        return fault

    async def _a_rank_is_gone(self) -> bool:
        """When one of several ranks dies, the others' collectives fail, and those errors may come first."""
        backend = self.fleet.backend
        asked = [self.fleet.get(rank.call("ready"), rank.name, ALIVE_S) for rank in self.fleet.learners]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failed = [a for a in answers if isinstance(a, backend.errors) and not isinstance(a, StuckError)]
        return any(backend.fault(error, self.fleet).kind in ("died", "replaced") for error in failed)

    async def rebuild(self, fault: Fault) -> None:
        """Fresh ranks that go on from the last update; a new incarnation tells their routers apart."""
        began = time.perf_counter()
        self._incarnation += 1
        while True:
            for rank in self.fleet.learners:
                self.fleet.backend.restart(rank)
            try:
                await join_ranks(self.fleet, self.fleet.learners)
                await self._restore(self._kept)
                break
            except self.fleet.backend.errors as error:
                fault = await self.recovery.after(error)
                self.recovery.note(f"{fault}; the learner starts again")
        self.publish()
        took = time.perf_counter() - began
        self.recovery.restarts["Learner"] += 1
        self.recovery.recovery_s.setdefault("Learner", []).append(took)
        step = self._kept.snapshot.version
        self.recovery.note(f"{fault}; the learner was built again after step {step} ({took:.1f} s)")

    async def _restore(self, state: LearnerState) -> None:
        shared = self.fleet.backend.put(state)
        restored = [rank.call("restore", shared, self._incarnation) for rank in self.fleet.learners]
        await self.fleet.get_all(restored, "restoring the learner", self.fleet.start_deadline_s)
