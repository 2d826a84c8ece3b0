"""Tells people which call takes long, since when and where it is stuck, before its deadline ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.run.fleet import Fleet, Handle, Reference

Stage = tuple[Handle, Reference]


@dataclass(eq=False)
class Call:
    """Something that is waited for.  stages: the workers it goes through, in order; more may be added."""

    what: str
    stages: Sequence[Stage]
    began: float
    told: bool = False


class Watchdog:
    """Looks at the calls under way.

    after_s: seconds until a call is spoken of, once.  note: tells people.
    """

    def __init__(self, fleet: Fleet, after_s: float, note: Callable[[str], None]) -> None:
        self.fleet, self.after_s, self.note = fleet, after_s, note
        self._calls: set[Call] = set()

    @contextlib.contextmanager
    def over(self, what: str, stages: Sequence[Stage]) -> Iterator[None]:
        """Watches a call for as long as the block lasts."""
        call = Call(what, stages, time.monotonic())
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await asyncio.sleep(self.after_s / 4)
            now = time.monotonic()
            for call in sorted(self._calls, key=lambda call: call.began):
                if not call.told and call.began + self.after_s <= now:
                    call.told = True
                    await self._tell(call, now)

    async def _tell(self, call: Call, now: float) -> None:
        waiting = first_waiting(self.fleet, call.stages)
        if waiting is None:
            return
        stack = await asyncio.to_thread(self.fleet.backend.stack, waiting)
        where = f"; its stack:\n{stack}" if stack else ""
        deadline = f"the deadline is {self.fleet.deadline_s:g} s"
        self.note(f"{call.what} waits for {waiting.name} since {now - call.began:.0f} s ({deadline}){where}")


def first_waiting(fleet: Fleet, stages: Sequence[Stage]) -> Handle | None:
    """The first worker that has not answered: where a call is stuck."""
    return next((handle for handle, reference in stages if not fleet.backend.is_ready(reference)), None)
