"""`musketeers status` on folders in every state that a run leaves them in."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.watch.logs import Follower, JsonLines, cut_back
from cluster.watch.status import RunStatus
from tests.watch.made_up import EXPERTS, record


def worker(name: str, state: str, **changed: Any) -> dict[str, Any]:
    """A worker in a status file."""
    return {"name": name, "state": state, "since_s": 0, "calls": 0, "restarts": 0, "node": "", "pid": 0, **changed}


def moment(**changed: Any) -> dict[str, Any]:
    """A status file's content."""
    workers = [
        worker("Expert(chain_sum)", "idle", restarts=2, node="10.0.0.7"),
        worker("Rollout(0)", "working", since_s=3, calls=2),
        worker("Learner(rank 0)", "starting", since_s=9, restarts=1),
    ]
    return {
        "time": time.time(), "phase": "training", "step": 7, "steps": 20, "running": 32, "waiting": 8,
        "oldest_running_s": 4.0, "oldest_waiting_s": 2.0, "dead": 0, "restarts": 3, "workers": workers, **changed,
    }  # fmt: skip


def shown(status: RunStatus, width: int = 140, height: int = 45) -> str:
    """What a person sees."""
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(status)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with seven steps."""
    log = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        log.append(record(step))
    return tmp_path


def test_a_running_run(folder: Path) -> None:
    (folder / "status.json").write_text(json.dumps(moment()))
    status = RunStatus(folder, EXPERTS, 20)
    status.look()
    text = shown(status)
    for expected in (
        "step 7/20", "chain_sum 0.875", "staleness 0.4", "idle 55%", "Expert(chain_sum) idle 2 restarts 10.0.0.7",
        "Rollout(0) working 0:03 2 calls", "Learner(rank 0) starting 0:09 1 restarts",
        "groups that wait 8 (oldest 2 s)",
    ):  # fmt: skip
        assert expected in text, expected
    assert not status.over


def test_a_driver_that_is_gone_is_noticed(folder: Path) -> None:
    (folder / "status.json").write_text(json.dumps(moment(time=time.time() - 100)))
    status = RunStatus(folder, EXPERTS, 20)
    status.look()
    assert "no news for 1:40" in shown(status)


def test_a_finished_run_is_over_and_not_silent(folder: Path) -> None:
    (folder / "status.json").write_text(json.dumps(moment(time=time.time() - 100, phase="finished")))
    status = RunStatus(folder, EXPERTS, 20)
    status.look()
    assert status.over and "no news" not in shown(status)


def test_a_run_that_has_not_said_anything_yet(tmp_path: Path) -> None:
    status = RunStatus(tmp_path, EXPERTS, 20)
    status.look()
    assert "no news of the run yet" in shown(status) and not status.over


@pytest.mark.parametrize(("width", "height"), [(70, 20), (200, 60)])
def test_it_fits_small_and_large_terminals(folder: Path, width: int, height: int) -> None:
    (folder / "status.json").write_text(json.dumps(moment()))
    status = RunStatus(folder, EXPERTS, 20)
    status.look()
    assert "Rollout(0)" in shown(status, width, height)


def test_steps_that_a_resume_writes_again_are_seen_once(folder: Path) -> None:
    status = RunStatus(folder, EXPERTS, 20)
    status.look()
    cut_back(folder / "metrics.jsonl", 4)
    JsonLines(folder / "metrics.jsonl").append(record(5))
    status.look()
    assert "step 5/20" in shown(status)


def test_a_follower_reads_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    follower = Follower(path)
    assert follower.read() == ([], False)
    path.write_bytes(b'{"step": 1}\n{"ste')
    assert follower.read() == ([{"step": 1}], False)
    with path.open("ab") as file:
        file.write(b'p": 2}\n')
    assert follower.read() == ([{"step": 2}], False)
    assert follower.read() == ([], False)
    path.write_bytes(b'{"step": 1}\n')
    assert follower.read() == ([{"step": 1}], True)
