"""Tells people which call takes long, since when and where it is stuck, before its deadline ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.run.fleet import Fleet, Stage


@dataclass(eq=False)
class Call:
    """Something that is waited for.  stages: the workers it goes through, in order; more may be added."""

    what: str
    stages: Sequence[Stage]
    began: float
    told: bool = False


class Watchdog:
    """Looks at the calls under way.

    after_s: seconds until a call is spoken of, once, and so is each process that calls wait for.
    note: tells people.
    """

    def __init__(self, fleet: Fleet, after_s: float, note: Callable[[str], None]) -> None:
        self.fleet, self.after_s, self.note = fleet, after_s, note
        self._calls: set[Call] = set()
        self._spoken_of: set[tuple[str, int]] = set()

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
        stage = first_waiting(self.fleet, call.stages)
        if stage is None or (stage.handle.name, stage.generation) in self._spoken_of:
            return
        self._spoken_of.add((stage.handle.name, stage.generation))
        stack = await asyncio.to_thread(self.fleet.backend.stack, stage.handle)
        where = f"; its stack:\n{stack}" if stack else ""
        deadline = f"the deadline is {self.fleet.deadline_s:g} s"
        name = stage.handle.name
        self.note(f"{call.what} has taken {now - call.began:.0f} s and waits for {name} ({deadline}){where}")


def first_waiting(fleet: Fleet, stages: Sequence[Stage]) -> Stage | None:
    """The first worker that has not answered: where a call is stuck."""
    return next((stage for stage in stages if not fleet.backend.is_ready(stage.reference)), None)
