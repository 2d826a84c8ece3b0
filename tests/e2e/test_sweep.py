"""Grids of runs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from rich.console import Console

from cluster.config import ConfigError, RunConfig, load
from cluster.jobs.client import Job, JobError
from cluster.run import sweep as sweeping
from cluster.run.sweep import Arm, Point, combinations, grid, named_arms, tuned, tuning
from cluster.run.sweeping import Plan, comparable
from cluster.watch.ladder import BEYOND
from tests.e2e.conftest import ROOT, Runs
from tests.jobs.nodes import wait_for

pytestmark = pytest.mark.e2e


def test_a_grid_has_every_combination_with_every_seed(runs: Runs) -> None:
    arms = combinations(["router.kind=perceiver,static", "learner.learning_rate=1e-3, 2e-3"])
    points = grid(runs.recipe, ["steps=3"], arms, 2)
    assert [point.config.run for point in points[:3]] == [
        "run-kind_perceiver-learning_rate_1e_3-s0",
        "run-kind_perceiver-learning_rate_2e_3-s0",
        "run-kind_static-learning_rate_1e_3-s0",
    ]
    assert len({p.config.run for p in points}) == len(points) == 8
    assert {(p.config.router.kind, p.config.learner.learning_rate, p.config.seed) for p in points} == {
        (kind, rate, seed) for kind in ("perceiver", "static") for rate in (1e-3, 2e-3) for seed in (0, 1)
    }
    assert all(point.config.steps == 3 for point in points)


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ("router.kind", "is not of the form key=value,value"),
        ("seed=1,2", "gives its runs names and seeds itself"),
        ("learner.learning_rate=1e-3,1e-3", "two runs the name"),
        ("router.knd=static", "unknown key 'router.knd'"),
    ],
)
def test_what_is_no_grid_is_refused(runs: Runs, over: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        grid(runs.recipe, [], combinations([over]), 1)


def test_a_run_of_that_name_that_computes_something_else_is_refused(runs: Runs) -> None:
    (point,) = grid(runs.recipe, [], combinations([]), 1)
    point.config.folder.mkdir(parents=True)
    (point.config.folder / "config.yaml").write_text(point.config.as_yaml())
    grid(runs.recipe, ["evaluation.every=3", "threads=2"], combinations([]), 1)
    for key, value in [("learner.learning_rate", "9e-4"), ("steps", "99"), ("evaluation.prompts", "11")]:
        with pytest.raises(ConfigError, match=f"run-s0 is another run, with other {key}: give"):
            grid(runs.recipe, [f"{key}={value}"], combinations([]), 1)


def test_named_arms_come_from_a_file_and_what_trains_nothing_runs_once(runs: Runs) -> None:
    path = runs.folder / "arms.yaml"
    path.write_text("full: []\nno prefix: [router.kind=none]\nadapter: ['policy.lora={rank: 2}', steps=4]\n")
    points = grid(runs.recipe, [], named_arms(path), 2)
    names = ["run-full-s0", "run-no_prefix-s0", "run-adapter-s0", "run-full-s1", "run-adapter-s1"]
    assert [p.config.run for p in points] == names
    assert points[2].config.policy.lora is not None and points[2].config.steps == 4
    assert [arm.name for arm in named_arms(path, ["adapter"])] == ["adapter"]
    with pytest.raises(ConfigError, match="has no 'other': it has full, no prefix, adapter"):
        named_arms(path, ["other"])
    for wrong, where in (
        ("- full", "it"),
        ("full: router.kind=none", "full"),
        ("a: []\nfull: [{a: 1}]", "full"),
        ("full: {overrides: [], rivals: false}", "full"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=f"must map names to lists .*: {where} does not"):
            named_arms(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="names no arm"):
        named_arms(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        named_arms(runs.folder / "nowhere.yaml")


def test_every_arm_that_trains_chooses_its_setting_by_validation(runs: Runs) -> None:
    arms = [Arm("a", (), "a"), Arm("b", ("router.kind=static",), "b"), Arm("c", ("router.kind=none",), "c")]
    trials = tuning(runs.recipe, ["steps=7"], arms, "learner.learning_rate=1e-3,2e-3")
    assert list(trials) == arms[:2] and {p.config.seed for points in trials.values() for p in points} == {1000}
    assert all(p.config.evaluation.every == 7 for points in trials.values() for p in points)
    rates = {(1e-3, "perceiver"): 0.2, (2e-3, "perceiver"): 0.4, (1e-3, "static"): 0.3, (2e-3, "static"): 0.3}
    best = tuned(arms, trials, lambda p: rates[p.config.learner.learning_rate, p.config.router.kind])
    assert [arm.overrides for arm in best] == [
        ("learner.learning_rate=2e-3",),
        ("router.kind=static", "learner.learning_rate=1e-3"),
        ("router.kind=none",),
    ]


def test_without_its_yardstick_nothing_is_compared_and_what_shares_no_seed_is_left_out(runs: Runs) -> None:
    arms = [Arm("a", (), "a"), Arm("b", ("router.kind=static",), "b"), Arm("c", ("router.kind=none",), "c")]
    points = grid(runs.recipe, [], arms, 2)
    console = Console(file=io.StringIO(), width=200)

    def kept(*names: str) -> list[str]:
        done = [p for p in points if p.config.run in [f"run-{name}" for name in names]]
        return [p.config.run.removeprefix("run-") for p in comparable(done, arms, console)]

    assert kept("b-s0", "c-s0") == []
    assert kept("a-s1", "b-s0", "c-s0") == ["a-s1", "c-s0"]
    assert kept("b-s0", "a-s0", "b-s1") == ["a-s0", "b-s0", "b-s1"]
    assert "nothing is compared" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_arm_that_is_no_rival_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text("a: []\nb: [steps=4]\nc: {overrides: [steps=5], rival: false}\n")
    arms = named_arms(path)
    assert [(arm.overrides, arm.rival) for arm in arms] == [((), True), (("steps=4",), True), (("steps=5",), False)]
    assert Plan(path, (), arms, 1, None, "").beyond == (*BEYOND, "c")
    trial = Arm("c-steps_6", ("steps=5", "steps=6"), "c", rival=False)
    (chosen,) = tuned(arms[2:], {arms[2]: [Point(load(ROOT / "configs" / "quickstart.yaml"), (), trial)]}, lambda _: 1)
    assert not chosen.rival and chosen.overrides == trial.overrides


def test_a_sweep_that_is_terminated_stops_its_runs_with_a_checkpoint() -> None:
    class Running:
        said: ClassVar[list[str]] = []

        def stop(self) -> None:
            self.said.append("stop")

        def wait(self) -> None:
            self.said.append("wait")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sweeping._all_stopped(Console(quiet=True)) as running:
        running.append(Running())  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for("the signal", lambda: False, 5)
    assert Running.said == ["stop", "wait"]
    assert signal.getsignal(signal.SIGTERM) is before


class Server:
    """A job server: what is under way there, and whether it answers."""

    def __init__(self, address: str) -> None:
        self.jobs: dict[str, Job] = {}
        self.silent, self.submitted = 0, 0

    def under_way(self, config: RunConfig) -> Job | None:
        return next((job for job in self.jobs.values() if job.run == config.run and not job.over), None)

    def submit(self, config: RunConfig) -> str:
        self.submitted += 1
        self.jobs["new"] = replace(LEFT, id="new", run=config.run)
        return "new"

    def find(self, name: str) -> Job:
        self.silent -= 1
        if self.silent >= 0:
            raise JobError("nothing answers")
        return self.jobs[name]

    def stop(self, job: Job) -> None:
        raise JobError("nothing answers")


LEFT = Job(id="left", run="run-s0", status="RUNNING", message="", configuration="", started=0.0, ended=None)


def test_a_sweep_takes_over_jobs_that_it_left_and_waits_for_a_silent_server(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (point,) = grid(runs.recipe, [], combinations([]), 1)
    server = Server("")
    monkeypatch.setattr(sweeping, "Jobs", lambda address: server)
    fresh = sweeping._Submitted(runs.recipe, point, "head")
    assert server.submitted == 1 and not fresh.over
    server.jobs = {"left": LEFT}
    taken = sweeping._Submitted(runs.recipe, point, "head")
    assert server.submitted == 1
    server.silent = sweeping.PATIENCE
    assert not any(taken.over for _ in range(sweeping.PATIENCE))
    server.jobs = {"left": replace(LEFT, status="SUCCEEDED")}
    assert taken.over and taken.succeeded
    server.silent = sweeping.PATIENCE + 1
    with pytest.raises(JobError):
        [taken.over for _ in range(sweeping.PATIENCE + 1)]


def test_a_job_that_cannot_be_stopped_leaves_no_other_running(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    (point,) = grid(runs.recipe, [], combinations([]), 1)
    monkeypatch.setattr(sweeping, "Jobs", Server)
    monkeypatch.setattr(Server, "ended", lambda *_: None, raising=False)
    console, stopped = Console(file=io.StringIO()), []
    other = SimpleNamespace(stop=lambda: stopped.append("stop"), wait=lambda: stopped.append("wait"))
    with pytest.raises(KeyError), sweeping._all_stopped(console) as running:
        running += [sweeping._Submitted(runs.recipe, point, "head"), other]  # type: ignore[list-item]
        raise KeyError
    assert stopped == ["stop", "wait"]
    assert "run-s0 may go on: nothing answers" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_sweep_of_named_arms_tunes_compares_and_shows_the_frozen_systems(runs: Runs) -> None:
    path = runs.folder / "arms.yaml"
    path.write_text("router: []\nstatic: [router.kind=static]\nno prefix: [router.kind=none]\n")
    command = [
        sys.executable, "-m", "cluster.cli", "sweep", str(runs.recipe), "steps=3", "--arms", str(path),
        "--tune", "learner.learning_rate=1e-3,3e-3", "--seeds", "2", "--out", str(runs.folder / "out"),
    ]  # fmt: skip
    done = runs.start(command)
    assert done.returncode == 0, done.stdout + done.stderr
    arms = {arm["label"]: arm for arm in json.loads((runs.folder / "out" / "results.json").read_text())}
    assert list(arms)[:3] == ["router", "static", "no prefix"]
    assert {"frozen policy alone", "experts' majority", "route and answer", "experts' answers as text"} <= arms.keys()
    assert arms["router"]["seeds"] == [0, 1] and arms["no prefix"]["seeds"] == []
    assert arms["no prefix"]["accuracy"] == arms["frozen policy alone"]["accuracy"]
    spent = {name: (arm["operations"], arm["operations_cold"]) for name, arm in arms.items()}
    assert 0 < spent["router"][0] < spent["router"][1], "the experts' features come from the cache in part"
    assert spent["static"][0] == spent["static"][1] > 0, "a static prefix asks no expert"
    chosen = json.loads((runs.folder / "out" / "tuning.json").read_text())
    assert set(chosen) == {"router", "static"} and all(len(each["validation"]) == 2 for each in chosen.values())


@pytest.mark.slow
def test_interrupted_and_started_again_it_runs_only_what_is_missing(runs: Runs) -> None:
    command = [
        sys.executable, "-m", "cluster.cli", "sweep", str(runs.recipe), "steps=20", "--seeds", "2",
        "--over", "router.kind=perceiver,static", "--out", str(runs.folder / "out"),
    ]  # fmt: skip
    # As a script's `&` starts it: with SIGINT ignored.
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        first = subprocess.Popen(command, env=runs.environment(), cwd=runs.folder, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, ignored)

    def done(name: str) -> Path:
        return runs.folder / "runs" / name / "summary.json"

    def steps(name: str) -> list[int]:
        path = runs.folder / "runs" / name / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    wait_for("the second run", lambda: len(steps("run-kind_static-s0")) >= 4, 200, 0.1)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130 and "the same command goes on with what is missing" in output
    assert done("run-kind_perceiver-s0").is_file() and not done("run-kind_static-s0").is_file()
    checkpoints = list((runs.folder / "runs" / "run-kind_static-s0" / "checkpoints").glob("step-*/manifest.json"))
    assert max(int(path.parent.name[5:]) for path in checkpoints) >= 4, "the run under way was not stopped, but killed"
    written = done("run-kind_perceiver-s0").stat().st_mtime_ns
    again = runs.start(command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 runs, 1 of them finished before" in again.stdout
    assert done("run-kind_perceiver-s0").stat().st_mtime_ns == written
    for kind in ("perceiver", "static"):
        for seed in (0, 1):
            assert steps(f"run-kind_{kind}-s{seed}") == list(range(1, 21))
    arms = json.loads((runs.folder / "out" / "results.json").read_text())
    assert [(arm["label"], arm["seeds"]) for arm in arms] == [
        ("router.kind=perceiver", [0, 1]), ("router.kind=static", [0, 1]),
    ]  # fmt: skip
