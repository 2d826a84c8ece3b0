"""Runs whose workers, or whose driver, are killed: nothing is lost, nothing is trained twice, the bound holds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cluster.run.admission import unranged
from cluster.run.checkpoint import read
from tests.e2e.conftest import Runs

pytestmark = pytest.mark.e2e
KINDS = {"expert": "ExpertActor", "rollout": "RolloutActor", "reward": "AsyncScoringWorker", "learner": "LearnerActor"}
DEADLINE_S = 240.0


@contextmanager
def running(runs: Runs, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a session of its own, with its output in a file; ended with all its processes."""
    with (runs.folder / "output.txt").open("ab") as output:
        child = subprocess.Popen(
            runs.command("execution=ray", "max_staleness=2", *arguments),
            env=runs.environment(),
            cwd=runs.folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            kill_all(child.pid)
            child.wait()


def kill_all(pid: int) -> None:
    """SIGKILL to a process and everything it started."""
    if psutil.pid_exists(pid):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            if process.is_running():
                process.kill()


def workers(child: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """The living actor processes of a kind, among those the run itself started."""
    found = []
    for process in psutil.Process(child.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if alive and title.split(".")[0] == f"ray::{KINDS[kind]}":
            found.append(process)
    return found


def steps(runs: Runs) -> int:
    """Whole lines of metrics so far."""
    path = Path(runs.folder / "runs" / "run" / "metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(
    what: str, condition: object, child: subprocess.Popen[bytes], runs: Runs, limit_s: float = DEADLINE_S
) -> None:
    """Waits for a condition; a run that ended early, or a deadline, fails with its output."""
    until = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        output = (runs.folder / "output.txt").read_text()
        assert child.poll() is None, f"the run ended before {what}:\n{output[-3000:]}"
        assert time.monotonic() < until, f"no {what} in time:\n{output[-3000:]}"
        time.sleep(0.05)


def strike(runs: Runs, child: subprocess.Popen[bytes], kind: str, rng: random.Random) -> None:
    """SIGKILL to one worker of a kind, and then a step that still gets done."""
    wait_for(f"a living {kind}", lambda: workers(child, kind), child, runs)
    victim, before = rng.choice(workers(child, kind)), steps(runs)
    victim.kill()
    wait_for(f"a step after the death of a {kind}", lambda: steps(runs) > before + 1, child, runs)


def assert_whole(runs: Runs, updates: int) -> None:
    """Every issued prompt ended once, every update has its groups, and no group was too old."""
    lines = runs.metrics()
    ordinals = [ordinal for line in lines for ordinal in line["ordinals"]]
    assert [line["step"] for line in lines] == list(range(1, updates + 1))
    assert len(ordinals) == len(set(ordinals)) == updates * 8
    assert max(line["staleness/max"] for line in lines) <= 2
    state = read(runs.folder / "runs" / "run" / "checkpoints").driver["admission"]
    trained, dead = unranged(state["trained"]), unranged(state["dead"])
    assert trained == set(ordinals) == set(range(state["next_ordinal"])) and not dead
    assert not state["retry"] and not state["finished"]
    assert all(model["sha256_before"] == model["sha256_after"] for model in runs.summary()["frozen"])


def test_a_run_survives_the_death_of_an_expert_and_of_the_learner(runs: Runs) -> None:
    rng = random.Random(0)
    with running(runs, "steps=60", "ray.dashboard_port=8297", "checkpoint.every=5") as child:
        wait_for("step 3", lambda: steps(runs) >= 3, child, runs)
        strike(runs, child, "expert", rng)
        strike(runs, child, "learner", rng)
        assert child.wait(DEADLINE_S) == 0, (runs.folder / "output.txt").read_text()[-3000:]
    assert_whole(runs, 60)
    output = (runs.folder / "output.txt").read_text()
    assert "Expert(" in output and "started again" in output
    assert "Learner(rank 0) died" in output and "was built again" in output


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_with_its_stack_and_started_again(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = runs.folder / "flag"
    monkeypatch.setenv("SLEEPY_FLAG", str(flag))
    arguments = ("steps=40", "ray.dashboard_port=8295", "ray.deadline_s=20", "router.kind=tests.plugins:SleepyRouter")
    with running(runs, *arguments) as child:
        wait_for("step 3", lambda: steps(runs) >= 3, child, runs)
        flag.touch()
        assert child.wait(DEADLINE_S) == 0, (runs.folder / "output.txt").read_text()[-3000:]
    assert_whole(runs, 40)
    output = (runs.folder / "output.txt").read_text()
    assert "stuck: " in output and "within 20 s" in output
    assert "plugins.py" in output and "in forward" in output, "the stack of the process that hangs is not shown"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_chaos_ten_workers_and_the_driver_are_killed(runs: Runs) -> None:
    rng = random.Random(1)
    victims = [kind for kind in KINDS for _ in range(2)] + rng.choices(list(KINDS), k=2)
    rng.shuffle(victims)
    updates = 900
    # Seed 0 learns slowly in some orders of arrival, undisturbed too; of 10 prompts each would be 10 points.
    both = (f"steps={updates}", "seed=1", "evaluation.prompts=50")
    arguments = (*both, "ray.dashboard_port=8296", "checkpoint.every=10")
    with running(runs, *arguments) as child:
        wait_for("step 3", lambda: steps(runs) >= 3, child, runs)
        for kind in victims[:5]:
            strike(runs, child, kind, rng)
        saved = steps(runs) + 11
        wait_for("a checkpoint that knows of these deaths", lambda: steps(runs) > saved, child, runs)
        kill_all(child.pid)
        child.wait()
    with running(runs, *arguments, "--resume") as child:
        so_far = steps(runs)
        wait_for("a step after the resume", lambda: steps(runs) > so_far, child, runs)
        for kind in victims[5:]:
            strike(runs, child, kind, rng)
        assert child.wait(2 * DEADLINE_S) == 0, (runs.folder / "output.txt").read_text()[-3000:]
    assert_whole(runs, updates)
    summary = runs.summary()
    assert sum(summary["restarts"].values()) == len(victims)
    assert {kind: times["count"] for kind, times in summary["recovery_s"].items()} == {
        name: victims.count(kind) for kind, name in zip(KINDS, ("Expert", "Rollout", "Reward", "Learner"), strict=True)
    }
    print("recovery, seconds:", summary["recovery_s"])
    calm = runs.train("run=calm", *both, "max_staleness=2")
    assert calm.returncode == 0, calm.stderr
    undisturbed, before = (runs.summary("calm")[key]["router"]["mean"] for key in ("eval", "eval_before"))
    disturbed = summary["eval"]["router"]["mean"]
    print(f"accuracy: {disturbed:.3f}, undisturbed {undisturbed:.3f}, before training {before:.3f}")
    assert undisturbed > before + 0.5
    assert abs(disturbed - undisturbed) <= 0.03


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_ten_moments_is_resumed_each_time(runs: Runs) -> None:
    rng = random.Random(2)
    updates = 120
    arguments = (f"steps={updates}", "execution=inline", "checkpoint.every=4")
    for _ in range(10):
        resume = ("--resume",) if (runs.folder / "runs" / "run" / "config.yaml").exists() else ()
        with running(runs, *arguments, *resume) as child:
            target = steps(runs) + rng.randint(1, 9)
            wait_for("the next moment", lambda goal=target: steps(runs) >= min(goal, updates - 2), child, runs)
            os.killpg(child.pid, signal.SIGKILL)
        with (runs.folder / "runs" / "run" / "metrics.jsonl").open("ab") as log:
            log.write(b'{"step": 9')  # torn, as a kill in the middle of a write would leave it
    with running(runs, *arguments, "--resume") as child:
        assert child.wait(DEADLINE_S) == 0, (runs.folder / "output.txt").read_text()[-3000:]
    assert_whole(runs, updates)
