"""What a run says of itself from moment to moment, over no-op engines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.run.monitor import Monitor, Now
from cluster.watch.message import text_of
from cluster.watch.telemetry import METRICS, PLAIN, Telemetry
from tests.pipeline.fake_fleet import Stage, World, config


class Moments:
    """Keeps all moments."""

    def __init__(self) -> None:
        self.seen: list[Now] = []

    def now(self, moment: Now) -> None:
        """See `Outlet`."""
        self.seen.append(moment)


def watch(stage: Stage, places: dict[str, tuple[str, int]] | None = None) -> list[Now]:
    """A run to its end, and its moments."""
    moments = Moments()

    async def run() -> None:
        monitor = Monitor(stage.driver, [moments], lambda: places or {}, every_s=0.001)
        async with monitor.watching():
            monitor.phase = "training"
            await stage.driver.run()
            monitor.phase = "finished"

    asyncio.run(run())
    return moments.seen


def test_moments_follow_the_run() -> None:
    seen = watch(Stage(config(max_staleness=2), World(delay_s=0.002)), {"Rollout(1)": ("10.0.0.3", 17)})
    steps = [moment.step for moment in seen]
    assert steps == sorted(steps) and steps[-1] == 20 and len(set(steps)) > 5
    assert seen[-1].phase == "finished" and {moment.phase for moment in seen[1:-1]} == {"training"}
    assert max(moment.running for moment in seen) > 0 and max(moment.waiting for moment in seen) > 0
    assert seen[-1].running == seen[-1].waiting == 0 and seen[-1].oldest_running_s == 0.0
    worked = {worker.name for moment in seen for worker in moment.workers if worker.state == "working"}
    assert {"Expert(0)", "Rollout(0)", "Rollout(1)", "Learner(0)"} <= worked
    assert next(w for w in seen[-1].workers if w.name == "Rollout(1)").node == "10.0.0.3"


def test_a_worker_that_hangs_has_the_oldest_call_and_shows_when_it_starts_again() -> None:
    stage = Stage(config(max_staleness=2, ray={"deadline_s": 0.5}), World())
    stage.worker("Rollout(2)").hangs = 1
    seen = watch(stage)
    mine = [worker for moment in seen for worker in moment.workers if worker.name == "Rollout(2)"]
    assert max(worker.since_s for worker in mine if worker.state == "working") > 0.3
    assert mine[-1].restarts == 1 and seen[-1].restarts == 1
    assert max(moment.oldest_running_s for moment in seen) > 0.3


def test_a_run_that_fails_says_so() -> None:
    stage = Stage(config(max_staleness=0), World())
    stage.worker("Learner(0)").raises["update"] = ArithmeticError("wrong")
    moments = Moments()

    async def run() -> None:
        monitor = Monitor(stage.driver, [moments])
        async with monitor.watching():
            await stage.driver.run()

    with pytest.raises(RuntimeError):
        asyncio.run(run())
    assert moments.seen[-1].phase == "failed"


def test_the_job_s_message_names_what_matters() -> None:
    stage = Stage(config(), World())
    moment = Monitor(stage.driver, []).moment()
    assert text_of(moment, None) == "starting: step 0/20"
    assert text_of(moment, 0.25) == "starting: step 0/20, reward 0.250"


class Instrument:
    """Stands for one of Ray's metrics: keeps what it is told."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: Any = None) -> None:
        self.name, self.keys, self.told, self.boundaries = name, tag_keys, {}, boundaries

    def set(self, value: float, tags: dict[str, str]) -> None:
        """A gauge's, a counter's or a histogram's."""
        assert set(tags) == set(self.keys), (self.name, tags)
        self.told.setdefault(tuple(tags.values()), []).append(value)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        """Only upwards."""
        assert value > 0
        self.set(value, tags)

    observe = inc


def test_everything_on_the_list_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own instruments need a cluster: the test on a real one asks Prometheus for all of this."""
    import ray.util.metrics

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray.util.metrics, kind, Instrument)
    stage = Stage(config(max_staleness=2), World())
    telemetry = Telemetry("fake", 20, 2)
    moments = watch(stage)
    for record in stage.notes.steps:
        telemetry.step({**dict.fromkeys(PLAIN, 0.0), **record, "curriculum/t": 1.0, "attention/t/e": 0.5})
    for moment in moments:
        telemetry.now(moment)
    assert not [name for name, made in telemetry._made.items() if not made.told]
    assert set(telemetry._made) == set(METRICS)
    ages = telemetry._made["staleness"]
    assert ages.boundaries == [0.5, 1.5, 2.5] and len(ages.told[("fake",)]) == 120
    often = telemetry._made["reward_mean"].told[("fake",)]
    assert len(often) == len(moments), "Ray forgets what is not set again, however long a step takes"
    counted = sum(telemetry._made["verdicts_total"].told[("fake", "t", "ok")])
    assert counted == pytest.approx(sum(record["verdicts/t/ok"] for record in stage.notes.steps))
