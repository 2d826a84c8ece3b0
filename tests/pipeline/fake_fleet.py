"""A fleet whose engines are no-ops that take random times, die and hang as told: the driver itself is the real one."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.config import RunConfig, parse
from cluster.run.admission import Admission, Limits
from cluster.run.driver import Driver
from cluster.run.fleet import Fault, Fleet, StuckError
from cluster.run.learning import Learning
from cluster.run.masking import VerifierHealth
from cluster.run.recovery import Recovery
from cluster.run.scoring import GroupReport, WaveReport
from experts.state import RouterSnapshot
from learner.engine import OptimizerState
from learner.gradient import Sums
from learner.learner import LearnerState, UpdateResult
from rollout.types import (
    Completion,
    Draws,
    FinishReason,
    Group,
    Prompt,
    RewardStatus,
    RouterStamp,
    Sampling,
    Score,
)


class Death(Exception):
    """What a dead worker's calls end with, downstream ones included."""

    def __init__(self, worker: FakeWorker, generation: int) -> None:
        super().__init__(f"{worker.name} is dead")
        self.worker, self.generation = worker, generation


class Loss(Exception):
    """A result that is gone with its node."""


def finished_group(ordinal: int) -> Group:
    """A scored group as a checkpoint keeps it."""
    tokens = np.zeros(1, np.int64)
    completion = Completion(tokens=tokens, logprobs=np.zeros(1, np.float32), text="", finish=FinishReason.STOP)
    return Group(
        prompt=Stream().prompt(ordinal),
        prompt_tokens=tokens,
        completions=(completion, completion),
        sampling=Sampling(temperature=1.0, max_new_tokens=1, samples=2),
        router=RouterStamp(version=0, incarnation=0, checksum="0"),
        draws=Draws(expert_mask=np.ones(1, bool)),
        prefix_hash="",
        prefix_sketch=np.zeros(1, np.float32),
        prefix_rms_ratio=1.0,
        feature_keys=("",),
        attention=np.ones((1, 1), np.float32),
        scores=(Score(reward=0.0), Score(reward=1.0)),
    )


class Ref:
    """A call's result; who waits for it and gives up does not stop the call."""

    def __init__(self, task: asyncio.Future[Any]) -> None:
        self.task = task
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.shield(self.task).__await__()


@dataclass(eq=False)
class FakeWorker:
    """Answers calls one after another.

    die_on: prompts that kill it.  deaths: how many of the next calls do; die_at: how many of a method's do.
    losses: how many calls of a method find that what they need is lost.  raises: what a method raises.
    """

    name: str
    world: World
    generation: int = 0
    deaths: int = 0
    hangs: int = 0
    die_on: set[int] = field(default_factory=set)
    die_at: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    raises: dict[str, Exception] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    queue: asyncio.Lock = field(default_factory=asyncio.Lock)
    killed: asyncio.Event = field(default_factory=asyncio.Event)

    def call(self, method: str, *args: Any, returns: int = 1, **kwargs: Any) -> Any:
        """A task, or two for the reward stage."""
        reference = Ref(asyncio.ensure_future(self._run(method, args, self.generation)))
        return (reference, reference) if returns == 2 else reference

    async def _run(self, method: str, args: tuple[Any, ...], generation: int) -> Any:
        values = [await arg if isinstance(arg, Ref) else arg for arg in args]
        async with self.queue:
            if generation in self.dead or self.generation != generation:
                raise Death(self, generation)
            self.world.timeline.append(method)
            if method in ("sample", "update", "encode"):
                await asyncio.sleep(self.world.rng.expovariate(1 / self.world.delay_s))
            prompts = values[0] if method == "sample" else ()
            if method in ("encode", "sample", "score", "update") and self.hangs:
                self.hangs -= 1
                await self.killed.wait()
                raise Death(self, generation)
            if self.losses[method]:
                self.losses[method] -= 1
                raise Loss(f"what {method} needs is lost")
            if method in self.raises:
                raise self.raises[method]
            if self.die_at[method]:
                self.die_at[method] -= 1
                self.dead.add(generation)
                raise Death(self, generation)
            if (self.deaths and method != "ready") or {p.ordinal for p in prompts} & self.die_on:
                self.deaths = max(self.deaths - 1, 0)
                self.dead.add(generation)
                raise Death(self, generation)
            return getattr(self.world, method)(*values)


class Backend:
    """Restarts fake workers."""

    errors: tuple[type[Exception], ...] = (Death, Loss, ArithmeticError, StuckError)
    survives = True

    def fault(self, error: Exception, fleet: Fleet) -> Fault:
        """Deaths know their worker."""
        if isinstance(error, Death):
            if error.generation != error.worker.generation:
                return Fault("replaced", error.worker.name, str(error))
            return Fault("died", error.worker.name, str(error), error.worker)
        if isinstance(error, Loss):
            return Fault("lost", "", str(error))
        if isinstance(error, ArithmeticError):
            return Fault("raised", "Learner(0)", str(error), fleet.learners[0], trace="in line 7 of the learner")
        return Fault("stuck", "", str(error))

    def restart(self, handle: Any) -> None:
        """A new generation with an empty queue; what the old one still had to do fails."""
        handle.generation += 1
        handle.queue = asyncio.Lock()
        handle.killed.set()
        handle.killed = asyncio.Event()

    def is_ready(self, reference: Any) -> bool:
        """Done, well or badly."""
        return bool(reference.task.done())

    def put(self, value: Any) -> Any:
        """Values are references already."""
        return value

    def stack(self, handle: Any) -> str:
        """A recognisable one."""
        return f"stack of {handle.name}"

    def log_tail(self, handle: Any) -> str:
        """A recognisable one."""
        return f"log of {handle.name}"


class World:
    """What the workers answer, and a learner's state that counts its updates."""

    def __init__(self, delay_s: float = 0.0005, no_signal: float = 0.0, seed: int = 0) -> None:
        self.rng, self.delay_s, self.no_signal = random.Random(seed), delay_s, no_signal
        self.version, self.incarnation = 0, 0
        self.trained: list[tuple[int, int]] = []
        self.timeline: list[str] = []

    def encode(self, messages: Any, rows: Any, keep: bool = True) -> list[int]:
        """Features of nobody."""
        return []

    def sample(self, prompts: list[Prompt], sampling: Any, router: RouterSnapshot, *features: Any) -> Any:
        """Which router it was."""
        return router.version, prompts

    def score(self, rollout: Any) -> WaveReport:
        """A report with made-up rewards."""
        version, prompts = rollout
        groups = tuple(
            GroupReport(p.ordinal, "t", version, made, (RewardStatus.OK,) * 2, 0, 1.0, (1.0,), 0.0, 10, made)
            for p in prompts
            for made in [(0.0, 0.0) if self.rng.random() < self.no_signal else (0.0, 1.0)]
        )
        return WaveReport(groups, 0, 0, 0, 0.0, 0.0, 0.0)

    def update(self, batch: list[int], *parts: Any) -> UpdateResult:
        """Counts."""
        self.version += 1
        self.trained += [(self.version, ordinal) for ordinal in batch]
        return UpdateResult(Sums(), 0.0, 0.0)

    def snapshot(self) -> RouterSnapshot:
        """The version."""
        return RouterSnapshot(self.version, self.incarnation, str(self.version), {})

    def moments(self) -> OptimizerState:
        """The version again."""
        return OptimizerState(self.version, {})

    def ready(self) -> bool:
        """Up."""
        return True

    def rendezvous(self) -> tuple[str, int]:
        """Nowhere."""
        return "", 0

    def join(self, place: Any) -> bool:
        """Alone."""
        return True

    def restore(self, state: LearnerState, incarnation: int) -> None:
        """Forgets what came after the kept state."""
        self.version, self.incarnation = state.snapshot.version, incarnation
        self.trained = [entry for entry in self.trained if entry[0] <= self.version]


class Stream:
    """Prompts that only have an ordinal."""

    def prompt(self, ordinal: int) -> Prompt:
        """Of a position."""
        return Prompt(ordinal=ordinal, task="t", messages=(), answer="")

    def __init__(self) -> None:
        self.noted: list[int] = []
        self.advances: list[int] = []

    def note(self, task: str, ordinal: int, right: float) -> None:
        """Remembers."""
        self.noted.append(ordinal)

    def advance(self, unissued: int) -> None:
        """Remembers."""
        self.advances.append(unissued)

    def levels(self) -> dict[str, int]:
        """None."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass
class Notebook:
    """A sink that remembers."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    deaths: list[tuple[int, Fault]] = field(default_factory=list)
    checkpoints: list[tuple[int, dict[str, Any], LearnerState]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def step(self, record: dict[str, Any]) -> None:
        """See `Sink`."""
        self.steps.append(record)

    def groups(self, step: int, groups: list[Any]) -> None:
        """See `Sink`."""

    def dead(self, ordinal: int, task: str, fault: Fault) -> None:
        """See `Sink`."""
        self.deaths.append((ordinal, fault))

    def checkpoint(self, step: int, learner: LearnerState, driver: dict[str, Any], finished: list[Any]) -> None:
        """See `Sink`."""
        self.checkpoints.append((step, driver, learner))

    async def validate(self, step: int, router: Any) -> None:
        """See `Sink`."""


def config(**settings: Any) -> RunConfig:
    """A configuration whose models are never loaded."""
    values = {
        "run": "fake",
        "steps": 20,
        "data": {"tasks": [{"name": "t", "dataset": "chain_sum"}]},
        "experts": [{"name": "e", "model": "/e"}],
        "policy": {"model": "/p", "workers": 3},
        "learner": {"groups": 6},
        "checkpoint": {"every": 4, "groups": False},
        "ray": {"deadline_s": 5.0},
    }
    return parse({**values, **settings}, "test")


@dataclass
class Stage:
    """A driver and everything around it."""

    config: RunConfig
    world: World
    notes: Notebook = field(default_factory=Notebook)

    def __post_init__(self) -> None:
        def some(kind: str, count: int) -> list[FakeWorker]:
            return [FakeWorker(f"{kind}({i})", self.world) for i in range(count)]

        c = self.config
        self.fleet = Fleet(
            some("Expert", 1), some("Rollout", c.policy.workers), some("Reward", 2), some("Learner", 1),
            c.ray.deadline_s, Backend(),
        )  # fmt: skip
        self.recovery = Recovery(self.fleet, c.pipeline.max_restarts, self.notes.notes.append, c.ray.warning_s)
        first = self.world.snapshot()
        state = LearnerState(first, OptimizerState(0, {}), {0: first}, {})
        self.learning = Learning(self.fleet, self.recovery, c.max_staleness, state)
        self.admission = Admission(c.learner.groups, c.max_staleness, c.steps, Limits(attempts=c.pipeline.attempts))
        self.driver = Driver(
            c,
            self.fleet,
            Stream(),
            self.admission,
            self.notes,
            self.recovery,
            self.learning,
            VerifierHealth(c.rewards, self.notes.notes.append),  # type: ignore[arg-type]
        )

    def run(self) -> None:
        """To the end."""
        asyncio.run(self.driver.run())

    def worker(self, name: str) -> FakeWorker:
        """By name."""
        return next(w for w in self.fleet.workers if w.name == name)  # type: ignore[return-value]
