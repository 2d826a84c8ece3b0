"""Whole runs of the real command: they learn, repeat, stop, resume and replay."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from statistics import fmean
from typing import Any

import pytest

from cluster.run.metrics import MACHINE_PREFIXES
from tests.e2e.conftest import Runs

pytestmark = pytest.mark.e2e


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without times, rates and cache gauges."""
    return [{k: v for k, v in line.items() if not k.startswith(MACHINE_PREFIXES)} for line in lines]


def trained(lines: list[dict[str, Any]]) -> list[int]:
    """Every ordinal, as often as it was trained."""
    return sorted(ordinal for line in lines for ordinal in line["ordinals"])


def test_a_run_on_ray_and_deepspeed_learns_and_touches_no_frozen_weight(runs: Runs) -> None:
    # Without a gate, which would begin to learn on the way: 40 steps are for the prefix.
    done = runs.train("execution=ray", "steps=40", "ray.dashboard_port=8299", "router.gate=false")
    assert done.returncode == 0, done.stdout + done.stderr
    rewards = [line["reward/mean"] for line in runs.metrics()]
    assert fmean(rewards[-8:]) > 1.4 * fmean(rewards[:8]), rewards
    summary = runs.summary()
    assert summary["steps"] == 40 and summary["samples"] == 40 * 8 * 4
    assert {model["worker"] for model in summary["frozen"]} == {
        "Expert(one)",
        "Expert(two)",
        "Rollout(0)",
        "Learner(rank 0)",
    }
    assert all(model["sha256_before"] == model["sha256_after"] for model in summary["frozen"])
    evaluation = summary["eval"]
    systems = {"router", "shuffled", "shuffled_within_task", "frozen_policy", "route_and_answer", "oracle_route"}
    assert systems <= evaluation.keys() and evaluation["experts"].keys() == {"one", "two"}
    for name in systems:
        assert evaluation[name].keys() >= {"tasks", "mean", "prompts"}
    assert trained(runs.metrics()) == list(range(40 * 8))
    assert max(line["staleness/max"] for line in runs.metrics()) == 0
    assert max(line["policy/logprob_mismatch"] for line in runs.metrics()) < 1e-4


def test_the_same_seed_writes_the_same_metrics_and_another_does_not(runs: Runs) -> None:
    # The second finds the frozen baselines measured, and has encoded nothing for them.
    settings = [
        f"evaluation.cache={runs.folder / 'baselines'}", "evaluation.router_examples=100",
        "data.tasks=[{name: sums, dataset: chain_sum, size: 200}]", "router.calibration.prompts=0",
    ]  # fmt: skip
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = runs.train(f"run={name}", f"seed={seed}", *settings)
        assert done.returncode == 0, done.stderr
    first, again, other = (comparable(runs.metrics(name)) for name in "abc")
    assert first == again
    assert first != other
    hits = [[line["cache/hit_rate"] for line in runs.metrics(name)] for name in "ab"]
    assert hits[0] == hits[1], "what was encoded for the baselines reached training, in other batches"


# Its level moves with nearly every update: up when any answer of two prompts is right, else down.
MOVING = (
    "data.tasks=[{name: digits, plugin: 'tests.plugins:Digits'}, {name: sums, dataset: chain_sum, size: 400,"
    " verifier: 'tests.plugins:rarely_right',"
    " curriculum: {levels: [0, 1, 2], raise_at: 1.0e-6, lower_at: 0.0, window: 2}}]"
)


@pytest.mark.slow
def test_a_stopped_run_with_a_curriculum_resumes_to_the_same_end(runs: Runs) -> None:
    whole = runs.train("run=whole", "steps=12", MOVING)
    assert whole.returncode == 0, whole.stderr
    assert len({line["curriculum/sums"] for line in runs.metrics("whole")}) > 1
    child = subprocess.Popen(
        runs.command("steps=12", MOVING),
        env=runs.environment(),
        cwd=runs.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(runs, child, 3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130, out + err
    assert "Traceback" not in err and "--resume" in out
    stopped_at = len(runs.metrics())
    assert 3 <= stopped_at < 12
    resumed = runs.train("steps=12", MOVING, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert comparable(runs.metrics()) == comparable(runs.metrics("whole"))
    assert trained(runs.metrics()) == list(range(12 * 8))
    replay = [sys.executable, "-m", "cluster.cli", "replay", str(runs.folder / "runs" / "whole"), "--step", "9"]
    done = runs.start(replay)
    assert done.returncode == 0 and "reproduced" in done.stdout, done.stdout + done.stderr


def test_a_run_goes_on_with_two_ranks_and_back_and_is_replayed(runs: Runs) -> None:
    assert runs.train("steps=3").returncode == 0
    two = runs.train(
        "steps=5", "execution=ray", "learner.ranks=2", "learner.zero_stage=2", "ray.dashboard_port=8298", "--resume"
    )
    assert two.returncode == 0, two.stdout + two.stderr
    back = runs.train("steps=7", "--resume")
    assert back.returncode == 0, back.stdout + back.stderr
    assert trained(runs.metrics()) == list(range(7 * 8))
    for step in (2, 5, 7):
        replay = [sys.executable, "-m", "cluster.cli", "replay", str(runs.folder / "runs" / "run"), "--step", str(step)]
        done = runs.start(replay)
        assert done.returncode == 0 and "reproduced" in done.stdout, done.stdout + done.stderr


def wait_for_step(runs: Runs, child: subprocess.Popen[str], step: int) -> None:
    """Waits until the log has a step, or fails with what the run said."""
    path, deadline = runs.folder / "runs" / "run" / "metrics.jsonl", time.monotonic() + 200
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        if child.poll() is not None:
            raise AssertionError("".join(child.communicate()))
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in time")
