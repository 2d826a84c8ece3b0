"""Workers without models: they wait as long as they are told, and the real driver drives them over real Ray.

A process hosts several of them; each still does one thing at a time, as a worker with a model would.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.config import RunConfig, parse
from cluster.run.admission import Admission, Limits
from cluster.run.driver import Driver
from cluster.run.faults import RayBackend
from cluster.run.fleet import Fault, Fleet, Reference
from cluster.run.learning import Learning
from cluster.run.masking import VerifierHealth
from cluster.run.recovery import Recovery
from cluster.run.scoring import GroupReport, WaveReport
from experts.state import RouterSnapshot
from learner.engine import OptimizerState
from learner.gradient import Sums
from learner.learner import LearnerState, UpdateResult
from rollout.types import Prompt, RewardStatus, Sampling


@dataclass(frozen=True)
class Latencies:
    """Seconds of each stage.  Rollouts are log-normal with this mean and coefficient of variation."""

    rollout_s: float = 0.0
    rollout_variation: float = 0.0
    reward_s: float = 0.0
    learner_s: float = 0.0

    def rollout(self, ordinal: int) -> float:
        """Of one prompt, the same in every run."""
        if not self.rollout_s:
            return 0.0
        spread = math.log(1 + self.rollout_variation**2)
        return random.Random(ordinal).lognormvariate(math.log(self.rollout_s) - spread / 2, math.sqrt(spread))


class Host:
    """An actor's process in which several simulated workers live."""

    def __init__(self, latencies: Latencies, parameters: int = 1) -> None:
        self.latencies, self.parameters = latencies, parameters
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ready(self) -> bool:
        """Answers once the process is up."""
        return True

    async def encode(self, worker: str, messages: Sequence[Any], rows: Sequence[int], keep: bool = True) -> int:
        """Features that are only a number."""
        return len(messages)

    async def sample(
        self, worker: str, prompts: list[Prompt], sampling: Sampling, router: RouterSnapshot, *features: Any
    ) -> tuple[tuple[int, list[int]], int]:
        """Which router it was and the ordinals, and how many there are."""
        async with self._busy[worker]:
            await _wait(max(self.latencies.rollout(p.ordinal) for p in prompts))
        return (router.version, [p.ordinal for p in prompts]), len(prompts)

    async def score(self, worker: str, rollout: tuple[int, list[int]]) -> tuple[Any, WaveReport]:
        """A report with both rewards in every group."""
        async with self._busy[worker]:
            await _wait(self.latencies.reward_s)
        version, ordinals = rollout
        ok = (RewardStatus.OK, RewardStatus.OK)
        groups = tuple(
            GroupReport(n, "task", version, (0.0, 1.0), ok, 0, 1.0, (1.0,), 0.0, 1, (0.0, 1.0)) for n in ordinals
        )
        return rollout, WaveReport(groups, 0, 0, 0, 0.0, 0.0, 0.0)

    async def receive(self, worker: str, router: RouterSnapshot) -> float:
        """Reads a published router to its last byte; when it was done, by the machine's clock."""
        router.arrays["weight"].sum()
        return time.time()


class LearnerHost:
    """The learner's process: one call after the other, in the order in which they came, as a real rank's."""

    def __init__(self, latencies: Latencies, parameters: int = 1) -> None:
        self.latencies, self.parameters, self._version = latencies, parameters, 0

    def ready(self) -> bool:
        """Answers once the process is up."""
        return True

    def begin(self) -> bool:
        """A new run."""
        self._version = 0
        return True

    def update(self, worker: str, batch: Sequence[int], *parts: Any) -> UpdateResult:
        """An update that changes only the version."""
        time.sleep(self.latencies.learner_s)
        self._version += 1
        return UpdateResult(Sums(), 0.0, 0.0)

    def snapshot(self, worker: str) -> RouterSnapshot:
        """The router, after the update before this call."""
        arrays = {"weight": np.zeros(self.parameters, np.float32)}
        return RouterSnapshot(self._version, 0, str(self._version), arrays)

    def moments(self, worker: str) -> OptimizerState:
        """The optimizer's state."""
        return OptimizerState(self._version, {})


async def _wait(seconds: float) -> None:
    if seconds:
        await asyncio.sleep(seconds)


@dataclass(frozen=True)
class Simulated:
    """A worker in a host."""

    name: str
    host: Any
    generation: int = 0

    @property
    def actor_id(self) -> str:
        """Of its host's process, in hex."""
        return self.host._actor_id.hex()

    def call(self, method: str, *args: Any, returns: int = 1, **kwargs: Any) -> Reference:
        """Starts a method; gives its reference, or one for each of several values."""
        return getattr(self.host, method).options(num_returns=returns).remote(self.name, *args, **kwargs)


def start_hosts(count: int, latencies: Latencies, parameters: int = 1) -> list[Any]:
    """Processes for simulated workers, up and ready; the first one is the learner's."""
    import ray

    kind = ray.remote(Host).options(num_cpus=0, max_concurrency=1000)
    hosts = [ray.remote(LearnerHost).options(num_cpus=0).remote(latencies, parameters)]
    hosts += [kind.remote(latencies, parameters) for _ in range(count - 1)]
    ray.get([host.ready.remote() for host in hosts])
    return hosts


def workers(kind: str, count: int, hosts: Sequence[Any]) -> list[Simulated]:
    """So many workers of a kind, spread over the hosts."""
    return [Simulated(f"{kind}({i})", hosts[i % len(hosts)]) for i in range(count)]


class Stream:
    """Prompts that have an ordinal and nothing else."""

    def prompt(self, ordinal: int) -> Prompt:
        """Of a position."""
        return Prompt(ordinal=ordinal, task="task", messages=(), answer="")

    def note(self, task: str, ordinal: int, right: float) -> None:
        """No curriculum."""

    def advance(self, unissued: int) -> None:
        """No curriculum."""

    def levels(self) -> dict[str, int]:
        """No curriculum."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}


@dataclass
class Clock:
    """A sink that only notes when steps came, and what was given up."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    dead_letters: int = 0

    def step(self, record: dict[str, Any]) -> None:
        """See `Sink`."""
        self.steps.append(record)
        self.arrivals.append(time.perf_counter())

    def groups(self, step: int, groups: list[Any]) -> None:
        """See `Sink`."""

    def dead(self, ordinal: int, task: str, fault: Fault) -> None:
        """See `Sink`."""
        self.dead_letters += 1

    def checkpoint(self, step: int, learner: LearnerState, driver: dict[str, Any], finished: list[Any]) -> None:
        """See `Sink`."""

    async def validate(self, step: int, router: Any) -> None:
        """See `Sink`."""


def configuration(steps: int, groups: int, staleness: int, rollouts: int) -> RunConfig:
    """A run whose models are never loaded, with one prompt a call and one call a worker."""
    return parse(
        {
            "run": "simulated",
            "steps": steps,
            "max_staleness": staleness,
            "data": {"tasks": [{"name": "task", "dataset": "chain_sum"}]},
            "experts": [{"name": "expert", "model": "/none"}],
            "policy": {"model": "/none", "workers": rollouts},
            "learner": {"groups": groups},
            "pipeline": {"prompts_per_call": 1, "calls_per_worker": 1},
            "checkpoint": {"every": steps, "groups": False},
        },
        "benchmarks/simulated.py",
    )


def make_driver(config: RunConfig, fleet: Fleet, clock: Clock) -> Driver:
    """The real driver over simulated workers."""
    recovery = Recovery(fleet, config.pipeline.max_restarts, print)
    first = RouterSnapshot(0, 0, "0", {})
    state = LearnerState(first, OptimizerState(0, {}), {0: first}, {})
    learning = Learning(fleet, recovery, config.max_staleness, state)
    admission = Admission(config.learner.groups, config.max_staleness, config.steps, Limits())
    masked = VerifierHealth(config.rewards, print)
    return Driver(config, fleet, Stream(), admission, clock, recovery, learning, masked)  # type: ignore[arg-type]


def simulated_fleet(hosts: Sequence[Any], rollouts: int, rewards: int) -> Fleet:
    """Workers of all kinds; the learner and the expert have a host to themselves, so that its clock is theirs."""
    import ray

    learner, expert, *others = hosts
    ray.get(learner.begin.remote())
    return Fleet(
        workers("Expert", 1, [expert]),
        workers("Rollout", rollouts, others),
        workers("Reward", rewards, others),
        workers("Learner", 1, [learner]),
        60.0,
        RayBackend(),
    )
