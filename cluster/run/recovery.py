"""Brings a fleet back after a fault: workers are started again, and a run that cannot be helped ends with the cause."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from cluster.run.fleet import Fault, Fleet, Handle, Stage, StuckError
from cluster.run.watchdog import Watchdog, first_silent, first_waiting

LOST = "what is lost"  # counted under a name of its own: no worker is to blame
LOST_IN_A_ROW = 1000  # without any success in between: one dead node loses many calls


class RunError(RuntimeError):
    """A run that cannot go on; the message names the worker and the cause."""


async def unstarted(error: Exception, fleet: Fleet) -> RunError:
    """What to say of a worker that failed before training began: with what its log says, and an engine's in it."""
    fault = fleet.backend.fault(error, fleet)
    log = await asyncio.to_thread(fleet.backend.log_tail, fault.who) if fault.who else ""
    said = [str(fault), fault.trace, f"the end of its log:\n{log}" if log else ""]
    return RunError("\n".join(part for part in said if part))


class Recovery:
    """Restarts experts, rollout and reward workers.  The learner's ranks restart together: see `Learning`.

    max_restarts: of one worker without a success in between; one more fault ends the run.
    note: tells people what happened.  warning_s: when the watchdog speaks of a call that still goes on.
    """

    def __init__(self, fleet: Fleet, max_restarts: int, note: Callable[[str], None], warning_s: float = 60.0) -> None:
        self.fleet, self.max_restarts, self.note = fleet, max_restarts, note
        self.watchdog = Watchdog(fleet, warning_s, note)
        self.restarts: Counter[str] = Counter()
        self.recovery_s: dict[str, list[float]] = {}
        self._in_a_row: Counter[str] = Counter()
        self._ready: set[asyncio.Task[None]] = set()
        self._starting: dict[str, float] = {}

    @property
    def starting(self) -> Mapping[str, float]:
        """Workers that were started again and are not ready yet, and when that began, by the monotonic clock."""
        return self._starting

    def summary(self) -> dict[str, Any]:
        """Restarts by worker, and seconds from a restart until the worker was ready, by kind of worker."""
        return {
            "restarts": dict(sorted(self.restarts.items())),
            "recovery_s": {
                kind: {"count": len(times), "median": median(times), "longest": max(times)}
                for kind, times in sorted(self.recovery_s.items())
            },
        }

    def state(self) -> dict[str, Any]:
        """JSON-able: what `summary` is made from."""
        return {"restarts": dict(self.restarts), "recovery_s": {k: list(v) for k, v in self.recovery_s.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from `state()`."""
        self.restarts = Counter(state["restarts"])
        self.recovery_s = {kind: list(times) for kind, times in state["recovery_s"].items()}

    def succeeded(self, handles: Sequence[Handle]) -> None:
        """These workers have just answered."""
        for handle in handles:
            self._in_a_row.pop(handle.name, None)
        for unknown in ("", LOST):
            self._in_a_row.pop(unknown, None)

    async def after(self, error: Exception, stages: Sequence[Stage] = ()) -> Fault:
        """Says what went wrong and restarts the worker to blame, if it is dead or stuck.

        Args:
            stages: the workers and references of the failed call, in order: the first reference that is
                not ready is where it is stuck.  Without any, all workers are asked for a sign of life.

        Raises:
            RunError: when the worker keeps failing.
        """
        fault = self.fleet.backend.fault(error, self.fleet)
        if isinstance(error, StuckError):
            fault = await self._stuck(fault, stages or error.stages)
        if fault.kind == "replaced":
            return fault  # one death fails every call under way: the first of them has started the worker again
        who, limit = (LOST, LOST_IN_A_ROW) if fault.kind == "lost" else (fault.worker, self.max_restarts)
        self._in_a_row[who] += 1
        if self._in_a_row[who] > limit:
            raise RunError(await self._last_words(fault, self._in_a_row[who])) from error
        if fault.kind in ("died", "stuck") and fault.who is not None and fault.who not in self.fleet.learners:
            self.restart(fault.who, fault)
        elif fault.kind == "raised":
            self.note(str(fault))
        return fault

    def hopeless(self, fault: Fault) -> RunError:
        """The error of a fault that another try would not mend."""
        trace = f"\n{fault.trace}" if fault.trace else ""
        return RunError(f"{fault}{trace}")

    def restart(self, handle: Handle, fault: Fault) -> None:
        """A fresh process behind the same handle; calls may be sent at once and wait until it is up."""
        began = self._starting[handle.name] = time.monotonic()
        self.fleet.backend.restart(handle)
        self.restarts[handle.name] += 1
        self.note(f"{fault}; started again (restart {self.restarts[handle.name]})")
        task = asyncio.create_task(self._time_until_ready(handle, began))
        self._ready.add(task)
        task.add_done_callback(self._ready.discard)

    async def _time_until_ready(self, handle: Handle, began: float) -> None:
        try:
            await self.fleet.get(handle.call("ready"), f"starting {handle.name}", self.fleet.start_deadline_s)
            kind = handle.name.partition("(")[0]
            self.recovery_s.setdefault(kind, []).append(time.monotonic() - began)
        except self.fleet.backend.errors:
            pass  # the next call to it fails the same way, and is dealt with there
        finally:
            if self._starting.get(handle.name) == began:
                del self._starting[handle.name]

    async def _stuck(self, fault: Fault, stages: Sequence[Stage]) -> Fault:
        stage = first_waiting(self.fleet, stages)
        handle = stage.handle if stage else None if stages else await first_silent(self.fleet)
        if handle is None:
            return fault
        generation = stage.generation if stage else handle.generation
        if time.monotonic() - self._starting.get(handle.name, -math.inf) < self.fleet.start_deadline_s:
            return Fault("replaced", handle.name, "it is still starting")
        stack = await asyncio.to_thread(self.fleet.backend.stack, handle)
        if generation != handle.generation:
            return Fault("replaced", handle.name, fault.detail)  # several calls hung there: one has seen to it
        where = f"; its stack:\n{stack}" if stack else ""
        return Fault("stuck", handle.name, f"{fault.detail}{where}", handle)

    async def _last_words(self, fault: Fault, times: int) -> str:
        log = await asyncio.to_thread(self.fleet.backend.log_tail, fault.who) if fault.who else ""
        tail = f"\n{fault.trace}" if fault.trace else f"\nthe end of its log:\n{log}" if log else ""
        worker = fault.worker or "a worker"
        return f"{worker} failed {times} times in a row and the run stops: {fault.kind}: {fault.detail}{tail}"
