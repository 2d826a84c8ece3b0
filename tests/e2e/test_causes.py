"""Whatever stops or holds up a real run, the message names the cause; what was trained stays."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.e2e.conftest import Runs
from tests.e2e.test_faults import DEADLINE_S, assert_whole, running, steps, wait_for, workers

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
HERE = Path(__file__).parent


def on_a_small_disk(runs: Runs, how: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run whose folder lies on a disk of its own; see `small_disk.py`."""
    folder = runs.folder / "runs"
    apart = ["unshare", "--map-root-user", "--mount", sys.executable, str(HERE / "small_disk.py")]
    command = runs.command(*arguments)
    return runs.start([*apart, how, str(folder), str(folder / "run" / "metrics.jsonl"), *command])


def test_a_disk_that_fills_up_ends_the_run_with_the_place_and_a_resume_goes_on(runs: Runs) -> None:
    done = on_a_small_disk(runs, "full", "steps=60", "checkpoint.every=2")
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "the run stopped" in line]
    assert "No space left on device" in line and str(runs.folder / "runs" / "run") in line and "--resume" in line, line
    assert "Traceback" not in done.stderr
    assert "resumed: exit status 0 after 60 steps" in done.stderr


def test_a_read_only_run_folder_is_refused_at_once(runs: Runs) -> None:
    done = on_a_small_disk(runs, "read-only", "steps=2")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written: Read-only file system: choose another root=FOLDER" in line
    assert "Traceback" not in done.stderr


def test_a_verifier_that_stays_mute_stops_the_run_by_its_task(runs: Runs) -> None:
    task = "data.tasks=[{name: shy, plugin: 'tests.plugins:Mute'}]"
    done = runs.train("execution=ray", "ray.dashboard_port=8294", "steps=40", "rewards.timeout_s=0.3", task)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "the run stopped" in line]
    assert re.search(r"'?shy'?", line) and "no verdict within 0.3 s" in line, line
    assert "Traceback" not in done.stderr


def test_an_expert_that_hangs_is_named_and_started_again(runs: Runs) -> None:
    arguments = ("steps=60", "ray.dashboard_port=8293", "ray.deadline_s=15", "ray.warning_s=5")
    with running(runs, *arguments) as child:
        wait_for("step 3", lambda: steps(runs) >= 3, child, runs)
        (victim, *_) = workers(child, "expert")
        victim.send_signal(signal.SIGSTOP)
        assert child.wait(DEADLINE_S) == 0, (runs.folder / "output.txt").read_text()[-3000:]
    assert_whole(runs, 60)
    output = " ".join((runs.folder / "output.txt").read_text().split())
    early, late = (
        re.search(pattern, output) for pattern in (r"it waits for (Expert\(\w+\))", r"(Expert\(\w+\)) stuck")
    )
    assert early and late and early[1] == late[1] and early.start() < late.start(), output[-3000:]
    assert "gave no answer within 15 s" in output
    assert runs.summary()["restarts"] == {late[1]: 1}


def test_a_cluster_that_is_long_gone_is_not_waited_for(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray remembers the last cluster that was started on a machine, and would try it first."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="r") as folder:  # sockets lie in it, whose paths must be short
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        monkeypatch.setenv("RAY_TMPDIR", folder)
        done = runs.train("execution=ray", "ray.dashboard_port=8292", "steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
