"""Tells people which wait takes long, since when and where it is stuck, before its deadline ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence

from cluster.run.fleet import Fleet, Handle, Stage, StuckError, Wait

ALIVE_S = 10.0  # a process that is gone says so at once, one that is busy or hangs not at all


class Watchdog:
    """Looks at a fleet's waits.

    after_s: seconds until a wait is spoken of, once, and so is each process that others wait for.
    note: tells people.
    """

    def __init__(self, fleet: Fleet, after_s: float, note: Callable[[str], None]) -> None:
        self.fleet, self.after_s, self.note = fleet, after_s, note
        self._looking = False
        self._told: set[Wait] = set()
        self._spoken_of: set[tuple[str, int]] = set()

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Looks for as long as the block lasts; a block inside another adds nothing."""
        if self._looking:
            yield
            return
        self._looking = True
        looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            self._looking = False
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self.after_s / 4)
            now = time.monotonic()
            self._told &= self.fleet.waits
            long = [wait for wait in self.fleet.waits - self._told if wait.began + self.after_s <= now]
            for wait in sorted(long, key=lambda wait: wait.began):
                self._told.add(wait)
                await self._tell(wait)

    async def _tell(self, wait: Wait) -> None:
        stage = first_waiting(self.fleet, wait.stages)
        handle = stage.handle if stage else None if wait.stages else await first_silent(self.fleet)
        generation = stage.generation if stage else handle.generation if handle else 0
        if handle is None or (handle.name, generation) in self._spoken_of:
            return
        self._spoken_of.add((handle.name, generation))
        stack = await asyncio.to_thread(self.fleet.backend.stack, handle)
        where = f"; its stack:\n{stack}" if stack else ""
        took, deadline = time.monotonic() - wait.began, f"the deadline is {wait.limit_s:g} s"
        self.note(f"{wait.what}: {took:.0f} s already; it waits for {handle.name} ({deadline}){where}")


def first_waiting(fleet: Fleet, stages: Sequence[Stage]) -> Stage | None:
    """The first worker that has not answered: where a call is stuck."""
    return next((stage for stage in stages if not fleet.backend.is_ready(stage.reference)), None)


async def first_silent(fleet: Fleet) -> Handle | None:
    """The first worker, in the order in which they wait for each other, that answers nobody."""

    async def answers(handle: Handle) -> bool:
        try:
            await fleet.get(handle.call("ready"), handle.name, ALIVE_S)
        except StuckError:
            return False
        except fleet.backend.errors:
            return True  # it is gone: whoever waits for it will be told
        return True

    asked = await asyncio.gather(*map(answers, fleet.workers))
    return next((handle for handle, answered in zip(fleet.workers, asked, strict=True) if not answered), None)
