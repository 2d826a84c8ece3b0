"""A run whose policy is a GGUF file and one of whose experts is an encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import gguf_files
from tests.e2e.conftest import Runs
from tests.experts.test_bidirectional import make_bert

pytestmark = pytest.mark.e2e


def test_a_gguf_policy_and_an_encoder_among_the_experts(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSKETEERS_MODELS", str(tmp_path / "models"))
    file, bert = gguf_files.write(tmp_path / "policy.gguf"), make_bert(tmp_path / "bert")
    settings = [
        f"policy.model={file}",
        f"experts.1={{name: reader, model: {bert}, max_tokens: 16, pool: mean}}",
        "router.warm_start={steps: 5, prompts: 20}",
        "router.text={template: '{answers}{prompt}', max_new_tokens: 2}",
    ]
    done = runs.train("steps=2", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "converting policy.gguf" in done.stdout and "warm start: the prefix is off" in done.stdout
    evaluation = runs.summary()["eval"]
    assert set(evaluation["experts"]) == {"one"} and {"text", "route_and_answer", "frozen_policy"} <= set(evaluation)
    frozen = runs.summary()["frozen"]
    assert frozen and all(model["sha256_before"] == model["sha256_after"] for model in frozen)
    lines = runs.metrics()
    assert max(line["policy/logprob_mismatch"] for line in lines) < 1e-4
    assert any(key.startswith("attention/") and key.endswith("/reader") for key in lines[-1])
    samples = json.loads((runs.folder / "runs" / "run" / "samples.json").read_text())
    assert samples and all(set(each["experts"]) == {"one"} for each in samples)


@pytest.mark.slow
def test_a_run_whose_only_expert_is_an_encoder(runs: Runs, tmp_path: Path) -> None:
    """No expert answers, so nothing that needs their answers is measured."""
    reader = f"experts=[{{name: reader, model: {make_bert(tmp_path / 'bert')}, max_tokens: 16, pool: mean}}]"
    done = runs.train("steps=1", reader)
    assert done.returncode == 0, done.stdout + done.stderr
    evaluation = runs.summary()["eval"]
    assert evaluation["experts"] == {} and not {"text", "majority", "oracle_route"} & set(evaluation)
