"""Updates on the learner's ranks, and everything that another learner would need to go on from the last one.

That is kept in the driver's process after every update, so a dead rank, or its whole node, costs at most
the step in progress.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from cluster.run.fleet import Fault, Fleet, Reference
from cluster.run.recovery import Recovery
from cluster.run.start import join_ranks
from experts.state import RouterSnapshot
from learner.engine import OptimizerState
from learner.learner import LearnerState, UpdateResult

T = TypeVar("T")


class LostGroupsError(RuntimeError):
    """The data of a batch cannot be reached any more."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Learning:
    """The learner as the driver sees it.  `router` is the current one, as one object that all workers read."""

    def __init__(self, fleet: Fleet, recovery: Recovery, max_staleness: int, state: LearnerState) -> None:
        self.fleet, self.recovery, self.max_staleness = fleet, recovery, max_staleness
        self.router: Reference = fleet.backend.put(state.snapshot)
        self._kept = state

    async def update(self, batch: Sequence[int], waves: int, parts: Sequence[Reference]) -> list[UpdateResult]:
        """One update; what each rank says of it.  A learner that dies over it is built again and repeats it.

        Args:
            parts: as for `LearnerRank.update`.

        Raises:
            LostGroupsError: when the groups themselves are gone.
            RunError: when the learner keeps dying.
        """
        ranks = self.fleet.learners
        while True:
            updates = [rank.call("update", batch, waves, *parts) for rank in ranks]
            router = ranks[0].call("snapshot")
            moments = [rank.call("moments") for rank in ranks] if self.fleet.backend.survives else []
            try:
                results: list[UpdateResult] = await self.fleet.get_all(updates, "the learner's update")
                snapshot: RouterSnapshot = await self.fleet.get(router, "the new router")
                optimizer = await self.fleet.get(moments[0], "the optimizer's state") if moments else None
            except self.fleet.backend.errors as error:
                fault = await self.recovery.after(error, list(zip(ranks, updates, strict=True)))
                if fault.kind == "lost":
                    raise LostGroupsError(fault) from error
                if fault.kind == "raised" and not await self._a_rank_is_gone():
                    raise
                await self.rebuild(fault)
                continue
            self.recovery.succeeded(ranks)
            self.router = router
            self._keep(snapshot, optimizer)
            return results

    async def again(self, make: Callable[[], Awaitable[T]]) -> T:
        """Does something outside training that needs the fleet, until it succeeds: evaluations, the last hashes."""
        while True:
            try:
                return await make()
            except self.fleet.backend.errors as error:
                fault = await self.recovery.after(error)
                if fault.who in self.fleet.learners:
                    await self.rebuild(fault)

    async def state(self) -> LearnerState:
        """Everything a checkpoint needs of the learner."""
        if not self.fleet.backend.survives:
            self._kept = await self.fleet.get(self.fleet.learners[0].call("state"), "the learner's state")
        return self._kept

    def _keep(self, snapshot: RouterSnapshot, optimizer: OptimizerState | None) -> None:
        oldest = snapshot.version - self.max_staleness
        history = {v: s for v, s in self._kept.history.items() if v >= oldest} | {snapshot.version: snapshot}
        optimizer = optimizer or self._kept.optimizer
        self._kept = replace(self._kept, snapshot=snapshot, history=history, optimizer=optimizer)

    async def _a_rank_is_gone(self) -> bool:
        """When one of several ranks dies, the others' collectives fail, and those errors may come first."""
        for rank in self.fleet.learners:
            try:
                await self.fleet.get(rank.call("ready"), rank.name)
            except self.fleet.backend.errors:
                return True
        return False

    async def rebuild(self, fault: Fault) -> None:
        """Fresh ranks that go on from the last update; a new incarnation tells their routers apart."""
        began = time.perf_counter()
        while True:
            for rank in self.fleet.learners:
                self.fleet.backend.restart(rank)
            try:
                await join_ranks(self.fleet, self.fleet.learners)
                state = self.fleet.backend.put(self._kept)
                restored = [r.call("restore", state, self._kept.snapshot.incarnation + 1) for r in self.fleet.learners]
                await self.fleet.get_all(restored, "restoring the learner")
                break
            except self.fleet.backend.errors as error:
                fault = await self.recovery.after(error)
                self.recovery.note(f"{fault}; the learner starts again")
        # Published routers may have been lost with the learner's node.
        self.router = self.fleet.backend.put(self._kept.snapshot)
        took = time.perf_counter() - began
        self.recovery.restarts["Learner"] += 1
        self.recovery.recovery_s.setdefault("Learner", []).append(took)
        step = self._kept.snapshot.version
        self.recovery.note(f"{fault}; the learner was built again after step {step} ({took:.1f} s)")
