"""Every collaborator and control as a whole run of the real command."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import Runs

pytestmark = pytest.mark.e2e

CHOOSER = ["router.kind=top1", "router.gate=true", "policy.lora={rank: 4}", "max_staleness=2", "checkpoint.every=1"]
TRAINED = {
    "task_id": [
        "router.states=task",
        "router.null_expert=true",
        "router.warm_start={steps: 5, prompts: 40}",
        "router.text={template: '{one}{two} {prompt}', max_new_tokens: 2}",
    ],
    "lora": ["router.kind=none", "policy.lora={rank: 4}"],
    "trained_text": ["router.kind=text", "policy.lora={rank: 4}", "router.text.max_new_tokens=2"],
}


def replayed(runs: Runs, step: int) -> bool:
    """Whether a step's gradient comes out again."""
    done = runs.start([*runs.command()[:3], "replay", str(runs.folder / "runs" / "run"), "--step", str(step)])
    return done.returncode == 0


def test_a_router_that_chooses_and_an_adapter_train_are_resumed_and_replayed(runs: Runs) -> None:
    done = runs.train("steps=3", *CHOOSER)
    assert done.returncode == 0, done.stdout + done.stderr
    more = runs.train("steps=5", *CHOOSER, "--resume")
    assert more.returncode == 0, more.stdout + more.stderr
    lines = runs.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["router/choice_entropy"] > 0 and line["router/grad_norm"] > 0 for line in lines)
    assert_frozen(runs)
    assert replayed(runs, 5)


def test_a_router_that_wants_everybody_finishes_without_stand_ins(runs: Runs) -> None:
    done = runs.train("steps=2", "router.kind=tests.plugins:SociableRouter")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no stand-ins for experts that are away: ValueError: somebody is missing" in done.stdout
    assert "stand_ins" not in runs.summary() and (runs.folder / "runs" / "run" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_it_trains(runs: Runs, name: str) -> None:
    done = runs.train("steps=2", *TRAINED[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(line["router/grad_norm"] > 0 for line in runs.metrics())
    assert_frozen(runs)
    assert name != "trained_text" or replayed(runs, 2)
    assert ("warm start: the prefix is off" in done.stdout) == (name == "task_id")
    start = json.loads((runs.folder / "runs" / "run" / "start.json").read_text())
    # Experts' words and a regression on them cost what a run that compares itself with others has to tell.
    assert (start["operations/experts"] > 0 and start["operations/learner"] > 0) == (name == "task_id")


def assert_frozen(runs: Runs) -> None:
    """No weight moved that should not, and engine and learner agree."""
    frozen = runs.summary()["frozen"]
    assert frozen and all(model["sha256_before"] == model["sha256_after"] for model in frozen)
    assert max(line["policy/logprob_mismatch"] for line in runs.metrics()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "text"])
def test_what_trains_nothing_is_measured(runs: Runs, kind: str) -> None:
    done = runs.train(f"router.kind={kind}", "router.text.template='{one}{two}{prompt}'")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (runs.folder / "runs" / "run" / "metrics.jsonl").exists()
    evaluation = runs.summary()["eval"]
    twin = {"none": "frozen_policy", "text": "text"}[kind]
    assert evaluation["router"] == evaluation[twin]
    other = {"none": "text", "text": "frozen_policy"}[kind]
    (line,) = [
        json.loads(line)["systems"]
        for line in (runs.folder / "runs" / "run" / "eval.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "after"
    ]
    assert line["router"]["outcomes"] == line[twin]["outcomes"]
    assert {"majority", "route_and_answer", "oracle_route", other} <= evaluation.keys()


def test_a_template_with_an_unknown_expert_is_refused(runs: Runs) -> None:
    done = runs.train("router.text.template='{three}{prompt}'")
    assert done.returncode == 2 and "{three} is neither" in " ".join(done.stderr.split())
