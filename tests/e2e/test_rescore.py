"""A real run's groups, scored again by the real command."""

from __future__ import annotations

import gzip
import json

import pytest

from tests.e2e.conftest import Runs


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_real_run_s_own_settings_change_nothing(runs: Runs) -> None:
    few = ("evaluation.prompts=2", "evaluation.router_examples=2", "evaluation.stand_ins=0")
    done = runs.train("steps=2", *few, "sampling.stop=[a, e, '12']", "sampling.max_new_tokens=8")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = runs.folder / "runs" / "run" / "groups" / "step-000001.jsonl.gz"
    lines = gzip.decompress(kept.read_bytes()).decode().splitlines()
    said = [completion for line in lines for completion in json.loads(line)["completions"]]
    assert all(stop not in completion["text"] for completion in said for stop in ("a", "e", "12"))
    assert {completion["finish"] for completion in said} == {"stop", "length"}
    command = [*runs.command()[:3], "score", str(runs.folder / "runs" / "run"), "--steps", "1..2", "--json"]
    again = runs.start(command)
    assert again.returncode == 0, again.stderr
    task = json.loads(again.stdout)["tasks"]["digits"]
    assert task["completions"] == 64 and not any(task["verdicts"].values())
    assert task["rewards"] == task["advantages"] == 0
    other = json.loads(runs.start([*command, "rewards.binary_at=0.2"]).stdout)["tasks"]["digits"]
    assert other["verdicts"]["wrong -> right"] > 0 and other["advantages"] > 0
