"""A run's prompts are its own for good: under any hash seed, and refused when they are no longer the same."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.run import groups
from cluster.run.folder import RunFolder
from cluster.serve.local import Musketeers
from experts.chat import Chat
from experts.loading import load_tokenizer
from rewards.sources import build_tasks
from rewards.stream import PromptStream
from rollout.types import Sampling
from tests.e2e.conftest import Runs
from tests.e2e.test_bad_input import refused
from tests.e2e.test_training import comparable

pytestmark = pytest.mark.e2e

# Its prompts go through sets.
TASK = "data.tasks=[{name: products, dataset: polynomial_multiplication, size: 120}]"
SHORT = (TASK, "evaluation.prompts=4", "evaluation.router_examples=4", "evaluation.stand_ins=0", "checkpoint.every=1")


SAMPLING = Sampling(temperature=0.0, max_new_tokens=2, samples=1)


def train(runs: Runs, monkeypatch: pytest.MonkeyPatch, hash_seed: int, *arguments: str) -> str:
    """Trains under a hash seed; what it prints."""
    monkeypatch.setenv("PYTHONHASHSEED", str(hash_seed))
    done = runs.train(*SHORT, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def change_digest(folder: Path) -> None:
    """As if the run had had another prompt."""
    path = RunFolder(folder).data
    noted: dict[str, Any] = json.loads(path.read_text())
    noted["tasks"]["products"]["pools"] = "0" * 32
    path.write_text(json.dumps(noted))


def test_a_run_resumed_under_another_hash_seed_sees_the_same_prompts_and_refuses_others(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(runs, monkeypatch, 1, "steps=1")
    train(runs, monkeypatch, 2, "steps=2", "--resume")
    folder = RunFolder(runs.folder / "runs" / "run")
    first = folder.checkpoints / "step-000000" / "manifest.json"
    assert folder.start.stat().st_mtime_ns >= first.stat().st_mtime_ns, "a log without a checkpoint is a lost one"
    config = folder.saved_config()
    stream = PromptStream(build_tasks(config.data), config.data)
    tokenizer = load_tokenizer(config.policy.model)
    for step in (1, 2):
        for group in groups.read(folder.groups, step, stream.prompt):
            assert Chat(tokenizer).tokenize(group.prompt.messages) == group.prompt_tokens.tolist()
    change_digest(folder.path)
    said = refused(capsys, monkeypatch, "train", str(runs.recipe), *SHORT, "steps=3", "--resume")
    assert "the prompts of task 'products' differ from the run's" in said and "start a new run" in said


def test_prompts_print_the_run_s_date_and_cut_ones_are_counted(runs: Runs, tmp_path: Path) -> None:
    policy = shutil.copytree(yaml.safe_load(runs.recipe.read_text())["policy"]["model"], tmp_path / "policy")
    (policy / "chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }} {{ messages[0].content }}{{ sign }}")
    named = (f"policy.model={policy}", "policy.chat_template_kwargs={sign: '?'}", "experts.0.template='{question}'")
    short = ("data.date=2001-02-03", "experts.1.max_tokens=8", "steps=1", *SHORT[1:])
    done = runs.train(*named, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = RunFolder(runs.folder / "runs" / "run")
    (line,) = runs.metrics()
    assert (line["experts/one/truncated"], line["experts/two/truncated"]) == (0.0, 1.0)
    config = folder.saved_config()
    stream, tokenizer = PromptStream(build_tasks(config.data), config.data), load_tokenizer(str(policy))
    for group in groups.read(folder.groups, 1, stream.prompt):
        text = f"03 February 2001 {group.prompt.messages[0]['content']}?"
        assert group.prompt_tokens.tolist() == tokenizer(text)["input_ids"]
    with Musketeers.from_run(folder.path) as opened:
        (asked,) = opened.policy.generate(
            opened._prompts("3"), SAMPLING, opened.opened.trained.snapshot, alone=True
        ).groups
        assert asked.prompt_tokens.tolist() == tokenizer("03 February 2001 3\nAnswer:?")["input_ids"]
        assert opened.experts[0].read(asked.prompt.messages).tokens == tokenizer("3")["input_ids"]
    replayed = runs.start([sys.executable, "-m", "cluster.cli", "replay", str(folder.path), "--step", "1"])
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_under_other_hash_seeds_a_run_is_the_same_to_its_end_and_of_other_prompts_nothing_is_measured(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ("steps=3", "router.gate=false")  # whose start would follow from the steps
    train(runs, monkeypatch, 1, "run=whole", *longer)
    train(runs, monkeypatch, 2, "steps=1", "router.gate=false")
    folder = runs.folder / "runs" / "run"
    (folder / "data.json").unlink()
    assert "of a version that kept no digests" in train(runs, monkeypatch, 3, *longer, "--resume")
    assert comparable(runs.metrics()) == comparable(runs.metrics("whole"))
    replayed = runs.start([sys.executable, "-m", "cluster.cli", "replay", str(folder), "--step", "2"])
    assert replayed.returncode == 0 and "reproduced" in replayed.stdout, replayed.stderr
    change_digest(folder)
    for arguments in (("replay", str(folder), "--step", "2"), ("eval", str(folder)), ("ablate", str(folder))):
        assert "the prompts of task 'products' differ from the run's" in refused(capsys, monkeypatch, *arguments)
