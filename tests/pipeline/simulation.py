"""A made-up fleet in virtual time that drives the admission state machine as the driver does."""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass, field

import numpy as np

from cluster.run.admission import Admission, Limits


@dataclass(frozen=True)
class Weather:
    """What the simulated machines do.

    wave: prompts a call.  spread: of the log-normal durations.  crash: chance that a call dies.
    poison: prompts that kill whatever they run on.  signal: share of groups that have any.
    save: chance of a checkpoint after an update; resume: chance that the driver dies after an event
    and goes on from its last checkpoint.
    """

    wave: int = 1
    spread: float = 1.0
    crash: float = 0.0
    poison: frozenset[int] = frozenset()
    signal: float = 1.0
    save: float = 0.3
    resume: float = 0.0


@dataclass
class Simulation:
    """Runs an admission to its end; `trained_at` is (version, produced version) by ordinal."""

    admission: Admission
    weather: Weather
    seed: int
    trained: dict[int, tuple[int, int]] = field(default_factory=dict)
    seen_finished: set[int] = field(default_factory=set)
    busy: float = 0.0

    def duration(self, ordinal: int) -> float:
        """Long prompts are the rewarded ones: a pipeline that prefers the quick ones would show it."""
        rng = np.random.default_rng((self.seed, ordinal))
        return float(rng.lognormal(sigma=self.weather.spread))

    def reward(self, ordinal: int) -> float:
        """Grows with the duration."""
        return min(self.duration(ordinal), 10.0)

    def has_signal(self, ordinal: int) -> bool:
        """Whether dynamic sampling would keep the group."""
        return bool(np.random.default_rng((self.seed, ordinal, 1)).random() <= self.weather.signal)

    def fresh(self) -> Admission:
        """What a new driver starts with."""
        a = self.admission
        return Admission(a.groups_per_update, a.max_staleness, a.updates, a.limits)

    def run(self) -> None:
        """Until the last update, or AssertionError when nothing can happen any more."""
        rng = np.random.default_rng(self.seed)
        saved, trained_then = json.dumps(self.admission.state()), dict(self.trained)
        calls: list[tuple[float, int, list[int]]] = []
        now, number = 0.0, 0
        for _ in range(200_000):
            a = self.admission
            if a.version >= a.updates:
                return
            while ordinals := a.issue(self.weather.wave):
                number += 1
                heapq.heappush(calls, (now + max(map(self.duration, ordinals)), number, ordinals))
            self.check()
            if (batch := a.batch()) is not None:
                for ordinal in batch:
                    assert ordinal not in self.trained, f"prompt {ordinal} trained twice"
                    self.trained[ordinal] = (a.version, a.finished[ordinal].version)
                a.train(batch)
                if rng.random() < self.weather.save:
                    saved, trained_then = json.dumps(a.state()), dict(self.trained)
            else:
                assert calls, f"nothing runs and no update can be formed: {a}"
                now, _, ordinals = heapq.heappop(calls)
                if self.weather.poison & set(ordinals) or rng.random() < self.weather.crash:
                    a.fail(ordinals)
                else:
                    a.finish(ordinals, dict.fromkeys(ordinals, 10))
                    flat = [
                        o for o in ordinals if np.random.default_rng((self.seed, o, 1)).random() > self.weather.signal
                    ]
                    a.filter(flat)
            if rng.random() < self.weather.resume:
                self.admission, calls, self.trained = self.fresh(), [], dict(trained_then)
                self.admission.restore(json.loads(saved))
        raise AssertionError("the run does not come to an end")

    def check(self) -> None:
        """Every issued prompt is in exactly one place, and never more are open than may be."""
        a = self.admission
        places = [set(a.retry), set(a.running), set(a.finished), a.trained, a.filtered, a.dead]
        assert sum(map(len, places)) == a.next_ordinal and set().union(*places) == set(range(a.next_ordinal))
        assert a.open <= (a.max_staleness + 1) * a.groups_per_update
        assert a.trained == set(self.trained)


def simulate(
    groups: int, staleness: int, updates: int, weather: Weather, seed: int, limits: Limits | None = None
) -> Simulation:
    """A whole simulated run."""
    simulation = Simulation(Admission(groups, staleness, updates, limits or Limits()), weather, seed)
    simulation.run()
    return simulation
