"""A run whose policy and one of whose experts are on vLLM, and whose engines are killed under it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Runs
from tests.e2e.test_faults import assert_whole, running, steps, wait_for, workers
from tests.models import make

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with heads of 32, as vLLM's attention on CPU wants them."""
    folder = tmp_path_factory.mktemp("wide")
    make(folder / "policy", "qwen2", width=128)
    make(folder / "one", "llama", width=128, seed=1)
    make(folder / "two", "gpt_neox", width=128, seed=2)
    return folder


def engines(child: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """Living processes of the vLLM engines of a kind of worker."""
    found = [part for worker in workers(child, kind) for part in worker.children(recursive=True)]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def test_a_run_whose_engines_are_killed_ends_by_itself_with_every_prompt_trained_once(
    tmp_path: Path, wide: Path
) -> None:
    runs = Runs(tmp_path, wide)
    vllm = ("engine: vllm", "max_model_tokens: 160", "kv_cache_gb: 0.125")
    arguments = (
        "steps=60",
        "ray.dashboard_port=8293",
        "checkpoint.every=10",
        f"policy={{model: {wide / 'policy'}, {', '.join(vllm)}}}",
        f"experts=[{{name: one, model: {wide / 'one'}, max_tokens: 32, replicas: 2}},"
        f" {{name: two, model: {wide / 'two'}, max_tokens: 32, {', '.join(vllm)}}}]",
    )
    with running(runs, *arguments) as child:
        # Four engines start one after the other: two that train, and one that comes and goes for the baselines.
        wait_for("step 3", lambda: steps(runs) >= 3, child, runs, 480)
        for kind in ("rollout", "expert"):
            before = steps(runs)
            for process in engines(child, kind):
                process.kill()
            wait_for(
                f"steps after the death of the {kind}'s engine", lambda so=before: steps(runs) > so + 8, child, runs
            )
        # The actor itself is killed: its engine must not stay behind, and another takes its place.
        orphans, before = engines(child, "rollout"), steps(runs)
        for worker in workers(child, "rollout"):
            worker.kill()
        wait_for("steps after the death of the rollout worker", lambda: steps(runs) > before + 8, child, runs)
        assert not psutil.wait_procs(orphans, timeout=60)[1]
        assert child.wait(600) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert_whole(runs, 60)
    summary = runs.summary()
    assert summary["restarts"] == {"Rollout(0)": 2, "Expert(two)": 1}
    output = (tmp_path / "output.txt").read_text()
    assert "Rollout(0) died" in output and "Expert(two) died" in output
    assert all(model["sha256_before"] == model["sha256_after"] for model in summary["frozen"])
    assert {model["worker"] for model in summary["frozen"]} >= {"Expert(one, replica 0)", "Expert(one, replica 1)"}
    assert max(line["policy/logprob_mismatch_max"] for line in runs.metrics()) < 1e-3
