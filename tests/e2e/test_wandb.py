"""A run's curves in Weights & Biases, kept offline."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Runs

pytestmark = pytest.mark.e2e


BLOCK = 32768


def entries(path: Path) -> Iterator[bytes]:
    """The entries of a W&B file: seven bytes of its own, then LevelDB's log format (checksum, length, type)."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := BLOCK - at % BLOCK) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def kept(runs: Runs) -> list[dict[str, Any]]:
    """The steps that W&B wrote into the run's folder."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted((runs.folder / "runs" / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for data in entries(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


@pytest.mark.slow
def test_every_step_is_there_and_a_resumed_run_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (2, 4):
        done = runs.train("tracking.wandb=tests", f"steps={steps}", "--auto-resume")
        assert done.returncode == 0, done.stdout + done.stderr
    lines = kept(runs)
    assert [line["_step"] for line in lines] == [1, 2, 3, 4]
    rewards = [line["reward/mean"] for line in runs.metrics()]
    assert [line["reward/mean"] for line in lines] == pytest.approx(rewards)


def test_it_is_refused_where_it_is_not_installed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs.folder / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    environment = runs.environment()
    monkeypatch.setattr(
        runs, "environment", lambda: {**environment, "PYTHONPATH": f"{runs.folder}:{environment['PYTHONPATH']}"}
    )
    done = runs.train("tracking.wandb=tests")
    assert done.returncode == 2 and "tracking.wandb: Weights & Biases is not installed" in " ".join(done.stderr.split())


def test_it_is_refused_where_nobody_is_logged_in(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(runs.folder))
    done = runs.train("tracking.wandb=tests")
    assert done.returncode == 2 and "set WANDB_API_KEY" in " ".join(done.stderr.split())
    assert not (runs.folder / "runs" / "run").exists()
