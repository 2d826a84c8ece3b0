"""What a run is doing at this moment, every few seconds: steps say nothing while one is stuck."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cluster.run.fleet import Fleet, Handle, Stage

if TYPE_CHECKING:
    from cluster.run.driver import Driver

EVERY_S = 2.0
PLACES_S = 30.0  # between two looks at where the workers are
Place = tuple[str, int]


@dataclass(frozen=True)
class WorkerNow:
    """A worker.

    since_s: how long the oldest call that is with it has been under way.  calls: that it has, one at work and the
        others waiting.
    node, pid: where its process is, empty and 0 where nobody knows yet.
    """

    name: str
    state: Literal["starting", "working", "idle"]
    since_s: float
    calls: int
    restarts: int
    node: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Now:
    """A moment of a run.

    time: seconds since 1970.  phase: such as training.
    running, waiting: prompts in some stage, and finished groups that wait for their update; `oldest_*_s` the age of
        the oldest of them.
    dead: prompts given up so far.  restarts: of workers, so far.
    """

    time: float
    phase: str
    step: int
    steps: int
    running: int
    waiting: int
    oldest_running_s: float
    oldest_waiting_s: float
    dead: int
    restarts: int
    workers: tuple[WorkerNow, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class Outlet(Protocol):
    """Takes moments somewhere: a file, Prometheus, the job's message."""

    def now(self, moment: Now) -> None:
        """One moment."""
        ...


class Monitor:
    """Looks at a driver for as long as `watching` lasts.

    phase: what the run is at, set by whoever knows.
    whereabouts: node and process of the workers by name; slow, and asked in a thread.
    note: tells people when an outlet does not work; the run goes on.
    """

    def __init__(
        self,
        driver: Driver,
        outlets: Sequence[Outlet],
        whereabouts: Callable[[], Mapping[str, Place]] = dict,
        every_s: float = EVERY_S,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.driver, self.outlets, self.whereabouts, self.every_s = driver, list(outlets), whereabouts, every_s
        self.note = note
        self.phase = "starting"
        self._places: Mapping[str, Place] = {}
        self._broken: list[Outlet] = []

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Tells the outlets how things are, all along and once more at the end."""
        looking = [asyncio.create_task(self._look()), asyncio.create_task(self._find())]
        try:
            yield
        except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
            self.phase = "stopped"
            raise
        except BaseException:
            self.phase = "failed"
            raise
        finally:
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)
            self.tell()

    def tell(self) -> None:
        """One look, now."""
        moment = self.moment()
        for outlet in self.outlets:
            try:
                outlet.now(moment)
            except OSError as error:
                if outlet not in self._broken:
                    self.note(f"{type(outlet).__name__} cannot say how the run is doing: {error}")
                self._broken.append(outlet)

    def moment(self) -> Now:
        """How things are."""
        driver, now = self.driver, time.monotonic()
        admission, recovery = driver.admission, driver.recovery
        began = [wait.began for wait in driver.fleet.waits if wait.stages]
        finished = [driver.finished_at(ordinal) for ordinal in admission.finished]
        return Now(
            time=time.time(),
            phase=self.phase,
            step=driver.step,
            steps=driver.config.steps,
            running=len(admission.running),
            waiting=len(finished),
            oldest_running_s=now - min(began, default=now),
            oldest_waiting_s=now - min(finished, default=now),
            dead=len(admission.dead),
            restarts=sum(recovery.restarts.values()),
            workers=tuple(workers_now(driver.fleet, recovery.starting, recovery.restarts, self._places, now)),
        )

    async def _look(self) -> None:
        while True:
            self.tell()
            await asyncio.sleep(self.every_s)

    async def _find(self) -> None:
        while True:
            self._places = await asyncio.to_thread(self.whereabouts)
            await asyncio.sleep(PLACES_S)


def where_it_is(fleet: Fleet, stages: Sequence[Stage]) -> list[Stage]:
    """The workers that a call is with: those of one kind work side by side, the next kind waits for them."""
    waiting = [stage for stage in stages if not fleet.backend.is_ready(stage.reference)]
    return [stage for stage in waiting if kind(stage.handle) == kind(waiting[0].handle)]


def kind(handle: Handle) -> str:
    """Such as `Expert` of `Expert(maths, replica 1)`."""
    return handle.name.partition("(")[0]


def workers_now(
    fleet: Fleet, starting: Mapping[str, float], restarts: Counter[str], places: Mapping[str, Place], now: float
) -> list[WorkerNow]:
    """Every worker, as the waits under way tell."""
    calls: dict[int, list[float]] = {}
    for wait in list(fleet.waits):
        for stage in where_it_is(fleet, wait.stages):
            calls.setdefault(id(stage.handle), []).append(wait.began)

    def one(handle: Handle) -> WorkerNow:
        mine = calls.get(id(handle), [])
        node, pid = places.get(handle.name, ("", 0))
        begun = starting.get(handle.name)
        state: Literal["starting", "working", "idle"] = (
            "starting" if begun is not None else "working" if mine else "idle"
        )
        since = now - (begun if begun is not None else min(mine, default=now))
        # The learner's ranks are built again together and counted as one.
        counted = handle.name if handle.name in restarts else kind(handle)
        return WorkerNow(handle.name, state, since, len(mine), restarts[counted], node, pid)

    return [one(handle) for handle in fleet.workers]
