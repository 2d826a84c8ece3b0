"""Workers behind one face, whether they are Ray actors or live in this process.

A call gives a reference at once; references go from worker to worker as arguments, so a rollout
travels to its verifier and to the learner without passing the driver.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.run.asked import Asked
from cluster.run.replicas import Replicas

Reference = Any


class StuckError(RuntimeError):
    """A worker that gave no answer within its deadline.  stages: the workers that the call went through, if known."""

    def __init__(self, message: str, stages: Sequence[Stage] = ()) -> None:
        super().__init__(message)
        self.stages = tuple(stages)


@dataclass(frozen=True)
class Fault:
    """Why a call failed.

    kind: `died` = the worker's process is gone, `replaced` = it is gone and another runs in its place already,
        `lost` = a result is gone with the node that held it, `stuck` = no answer in time, `raised` = the
        worker's code raised.
    worker: name of the worker to blame, if that is known; `who` its handle.
    trace: where in the worker its code raised.
    """

    kind: Literal["died", "replaced", "lost", "stuck", "raised"]
    worker: str
    detail: str
    who: Handle | None = None
    trace: str = ""

    def __str__(self) -> str:
        return f"{self.worker} {self.kind}: {self.detail}" if self.worker else f"{self.kind}: {self.detail}"


class Handle(Protocol):
    """A worker."""

    @property
    def name(self) -> str:
        """Such as `Expert(arithmetic)`: the same for as long as the run lasts."""
        ...

    @property
    def generation(self) -> int:
        """How many processes this worker has had before the present one."""
        ...

    def call(self, method: str, *args: Any, returns: int = 1, **kwargs: Any) -> Reference:
        """Starts a method; gives its reference, or one for each of several values."""
        ...


@dataclass(frozen=True)
class Stage:
    """A worker that a call goes through, the call's reference there, and which of its processes got it."""

    handle: Handle
    reference: Reference
    generation: int

    @classmethod
    def of(cls, handle: Handle, reference: Reference) -> Stage:
        """A call that has just been sent."""
        return cls(handle, reference, handle.generation)


@dataclass
class Inline:
    """A worker in this process: calls run at once."""

    name: str
    worker: Any
    generation: int = 0

    def call(self, method: str, *args: Any, returns: int = 1, **kwargs: Any) -> Reference:
        """Runs a method and returns its value."""
        return getattr(self.worker, method)(*args, **kwargs)


@dataclass(eq=False)
class Wait:
    """A remote wait under way.  stages: the workers its call goes through, if that is known; more may be added."""

    what: str
    stages: Sequence[Stage]
    limit_s: float
    began: float


class Backend(Protocol):
    """What a fleet's place can say and do about its workers when something goes wrong.

    errors: exceptions of failed calls that `fault` understands; any other one is a bug and is not caught.
    survives: whether workers can be started again, so that state must be kept outside them.
    """

    errors: tuple[type[Exception], ...]
    survives: bool

    def fault(self, error: Exception, fleet: Fleet) -> Fault:
        """Names the worker to blame."""
        ...

    def restart(self, handle: Any) -> None:
        """Replaces a worker by a fresh one behind the same handle, and ends the old one if it is still there."""
        ...

    def is_ready(self, reference: Reference) -> bool:
        """Whether a call has ended, well or badly."""
        ...

    def put(self, value: Any) -> Reference:
        """Makes a value of the driver one object that any number of calls can take."""
        ...

    def stack(self, handle: Any) -> str:
        """What a worker's threads are doing now, for people; empty when that cannot be found out."""
        ...

    def log_tail(self, handle: Any) -> str:
        """The last lines a worker wrote to its log; empty when there are none."""
        ...


class InProcess:
    """The backend of workers in this process: an error is the caller's own, and goes up as it is."""

    errors: tuple[type[Exception], ...] = ()
    survives = False

    def fault(self, error: Exception, fleet: Fleet) -> Fault:
        """See `Backend`; never asked, because `errors` is empty."""
        raise error

    def restart(self, handle: Any) -> None:
        """See `Backend`."""
        raise StuckError(f"{handle.name} lives in this process and cannot be started again")

    def is_ready(self, reference: Reference) -> bool:
        """See `Backend`; calls run at once."""
        return True

    def put(self, value: Any) -> Reference:
        """See `Backend`."""
        return value

    def stack(self, handle: Any) -> str:
        """See `Backend`."""
        return ""

    def log_tail(self, handle: Any) -> str:
        """See `Backend`."""
        return ""


@dataclass
class Fleet:
    """All workers of a run.  `experts` are in the router's order.

    copies: of each expert, its replicas; by default every worker is an expert of its own.
    deadline_s: of every wait; start_deadline_s: of those for workers that load models.
    waits: all that are under way.
    asked: what the collaborator wants of the experts.
    encoders: places of experts that read and cannot answer.
    """

    experts: Sequence[Handle]
    rollouts: Sequence[Handle]
    rewards: Sequence[Handle]
    learners: Sequence[Handle]
    deadline_s: float
    backend: Backend = field(default_factory=InProcess)
    start_deadline_s: float = 900.0
    waits: set[Wait] = field(default_factory=set)
    copies: Sequence[Replicas] = ()
    asked: Asked = field(default_factory=Asked)
    encoders: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.copies = self.copies or [Replicas([expert]) for expert in self.experts]

    @property
    def workers(self) -> list[Handle]:
        """All of them."""
        return [*self.experts, *self.rollouts, *self.rewards, *self.learners]

    def encode(self, prompts: Sequence[Any]) -> list[Stage]:
        """Calls for what the collaborator wants of every expert; `experts.expert.whole` puts the parts together."""
        shown = self.asked.donors(prompts)
        if self.asked.what == "answers":
            return self.answers(shown, self.asked.answer_tokens)
        return self.states(shown) if self.asked.what == "states" else []

    def states(self, prompts: Sequence[Any], keep: bool = True) -> list[Stage]:
        """Calls for every expert's features of these very prompts.  keep: see `Expert.encode`."""
        return self._ask(prompts, "encode", keep)

    def answers(self, prompts: Sequence[Any], max_new_tokens: int) -> list[Stage]:
        """Calls for the own answers to these very prompts of every expert that can answer."""
        able = [expert for place, expert in enumerate(self.copies) if place not in self.encoders]
        return self._ask(prompts, "answers", max_new_tokens, of=able)

    def _ask(
        self, prompts: Sequence[Any], method: str, *more: Any, of: Sequence[Replicas] | None = None
    ) -> list[Stage]:
        stages = []
        for expert in self.copies if of is None else of:
            for handle, rows in expert.split(prompts, self.backend.is_ready):
                made = handle.call(method, [prompts[row].messages for row in rows], rows, *more)
                expert.sent(handle, made, len(rows))
                stages.append(Stage.of(handle, made))
        return stages

    async def prepare(self, answers: bool) -> None:
        """An engine that gives states may have to make room for one that answers, which takes as long as a start."""
        for expert in self.experts:
            made = expert.call("prepare", answers)
            await self.get(made, f"preparing {expert.name}", self.start_deadline_s, stages=[Stage.of(expert, made)])

    async def get(
        self, reference: Reference, what: str, limit_s: float | None = None, stages: Sequence[Stage] = ()
    ) -> Any:
        """The value of a reference, or of a coroutine.

        Args:
            what: is waited for, for people.
            limit_s: instead of the deadline.
            stages: the workers it goes through, in order.

        Raises:
            StuckError: when it does not come in time.
        """
        (value,) = await self.get_all([reference], what, limit_s, stages)
        return value

    async def get_all(
        self,
        references: Sequence[Reference],
        what: str,
        limit_s: float | None = None,
        stages: Sequence[Stage] = (),
    ) -> list[Any]:
        """The values of several references; see `get`."""
        if not any(inspect.isawaitable(reference) for reference in references):
            return list(references)
        limit = limit_s or self.deadline_s
        wait = Wait(what, stages, limit, time.monotonic())
        self.waits.add(wait)
        try:
            # Not `wait_for`, which on Python 3.11 swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(limit):
                return list(await asyncio.gather(*map(_value, references)))
        except TimeoutError:
            raise StuckError(f"{what} gave no answer within {limit:g} s", stages) from None
        finally:
            self.waits.discard(wait)

    def close(self) -> None:
        """Ends the workers."""
        for handle in [*self.rewards, *self.rollouts, *self.experts, *self.learners]:
            if isinstance(handle, Inline) and hasattr(handle.worker, "close"):
                handle.worker.close()


async def _value(reference: Reference) -> Any:
    return await reference if inspect.isawaitable(reference) else reference
