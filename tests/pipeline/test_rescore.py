"""`musketeers score RUN --steps`: a run's saved groups under its own and under other verifier settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster import cli
from cluster.config import ConfigError, parse
from cluster.run import groups
from cluster.run.rescore import Changes, rescore_run
from cluster.watch import logs
from rewards.sources import build_tasks
from rewards.stream import PromptStream
from rewards.worker import RewardWorker
from rollout.types import Completion, FinishReason, Group, Prompt, RewardStatus, Score
from tests.pipeline.fake_fleet import finished_group
from tests.pipeline.runs import made_up_run, settings

STEPS, GROUPS = 3, 4
NASTY = "\x1b[2J\u202e {gold}"  # right to `number`, wrong to `integer`
SAID = ("{gold}", "The answer is {gold}", "no idea", NASTY)


def data_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """Sums from a file, and the same ones under another verifier."""
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(60)]
    source = folder / "sums.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = {"name": "sums", "path": str(source), "columns": {"marker": None}}
    return {"tasks": [sums, {**sums, "name": "more", "verifier": "integer"}], **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint, a log, and groups that a real reward worker has scored."""
    config = parse(settings(tmp_path, data=data_of(tmp_path)), "test")
    tasks = build_tasks(config.data)
    stream = PromptStream(tasks, config.data)
    folder = made_up_run(tmp_path, (2,), finished=False, driver={"stream": stream.state()}, data=data_of(tmp_path))
    worker = RewardWorker({name: task.verifier for name, task in tasks.items()}, config.rewards)
    log = logs.JsonLines(folder / "metrics.jsonl")
    try:
        for step in range(1, STEPS + 1):
            prompts = [stream.prompt(GROUPS * (step - 1) + n) for n in range(GROUPS)]
            groups.write(folder / "groups", step, worker.score_groups([a_group(prompt) for prompt in prompts]))
            log.append({"step": step})
    finally:
        worker.close()
    return folder


def a_group(prompt: Prompt) -> Group:
    def completion(text: str) -> Completion:
        return Completion(
            tokens=np.zeros(1, np.int64), logprobs=np.zeros(1, np.float32), text=text, finish=FinishReason.STOP
        )

    said = tuple(completion(text.replace("{gold}", prompt.answer)) for text in SAID)
    return replace(finished_group(0), prompt=prompt, completions=said, scores=())


def change_scores(run: Path, step: int, *scores: Score) -> None:
    """Changes what is kept of a step's first group."""
    config = parse(settings(run.parent, data=data_of(run.parent)), "test")
    stream = PromptStream(build_tasks(config.data), config.data)
    first, *others = groups.read(run / "groups", step, stream.prompt)
    groups.write(run / "groups", step, [first.scored(scores), *others])


def score(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit status and what `musketeers score` printed."""
    monkeypatch.setattr("sys.argv", ["musketeers", "score", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_a_run_s_own_settings_change_nothing(run: Path) -> None:
    found = rescore_run(run, f"1..{STEPS}", None, [], None)
    assert set(found) == {"sums", "more"}
    for changes in found.values():
        assert (changes.groups, changes.completions) == (6, 24)
        assert not changes.moves and not changes.rewards and changes.advantages == 0 and not changes.examples
        assert changes.before == changes.after
    assert rescore_run(run, "2", None, [], None)["sums"].groups == 2


def test_a_kept_group_has_its_stop_strings_and_one_of_before_has_none(run: Path) -> None:
    config = parse(settings(run.parent, data=data_of(run.parent)), "test")
    stream = PromptStream(build_tasks(config.data), config.data)
    first, *_ = groups.read(run / "groups", 1, stream.prompt)
    assert first.sampling.stop == ()
    kept = replace(first, sampling=replace(first.sampling, stop=("\n\nQ", "é")))
    groups.write(run / "groups", 1, [kept])
    assert groups.read(run / "groups", 1, stream.prompt)[0].sampling == kept.sampling


def test_another_verifier_s_verdicts_and_advantages_are_counted(run: Path) -> None:
    found = rescore_run(run, "2..3", None, ["data.tasks.0.verifier=integer", "data.tasks.1.verifier=number"], None)
    stricter, milder = found["sums"], found["more"]
    assert stricter.moves == {"right -> wrong": 8} and milder.moves == {"wrong -> right": 8}
    assert stricter.advantages == milder.advantages == 4
    assert sum(stricter.before) == 12 and sum(stricter.after) == 4
    first = milder.examples[0]
    assert (first.step, first.sample, first.move) == (2, 1, "wrong -> right")
    assert first.completion == f"The answer is {first.answer}" and len(milder.examples) == 3


def test_masked_ones_that_would_be_scored_are_counted(run: Path) -> None:
    late = Score(reward=0.0, answer=0.0, status=RewardStatus.TIMEOUT, reason="late")
    change_scores(run, 1, late, late, late, Score(reward=1.0, answer=1.0))
    found = rescore_run(run, "1..1", None, [], None)
    assert found["sums"].moves == {"masked -> right": 2, "masked -> wrong": 1} and not found["more"].moves
    assert found["sums"].advantages == 1 and (len(found["sums"].before), len(found["sums"].after)) == (5, 8)
    assert not found["sums"].rewards
    right = Score(reward=1.0, answer=1.0)
    change_scores(run, 1, right, right, late, right)  # no signal, until the masked one turns out wrong
    sums = rescore_run(run, "1..1", None, [], None)["sums"]
    assert sums.moves == {"masked -> wrong": 1} and sums.advantages == 1


def test_rewards_that_change_without_a_verdict_change_advantages(run: Path) -> None:
    terms = "[{kind: answer, weight: 1.0}, {kind: format, weight: 0.5, pattern: answer}]"
    changes = rescore_run(run, "1..3", None, [f"data.tasks.0.rewards={terms}"], None)["sums"]
    assert not changes.moves and changes.rewards == 6 and changes.advantages == 6
    assert sum(changes.after) - sum(changes.before) == pytest.approx(3.0)
    scaled = rescore_run(run, "1..3", None, ["data.tasks.0.rewards=[{kind: answer, weight: 2.0}]"], None)["sums"]
    assert scaled.rewards == 18 and scaled.advantages == 0, "GRPO divides by the standard deviation"


def test_an_algorithm_without_advantages_has_none_to_change() -> None:
    changes = Changes()
    group = a_group(Prompt(ordinal=0, task="t", messages=(), answer="1")).scored((Score(reward=0.0),) * 4)
    changes.add(1, group, (Score(reward=1.0),) * 4, "1", lambda scores: None)
    changes.add(2, group, (Score(reward=1.0),) * 4, "1", lambda scores: [0.0] * 4)
    assert changes.advantages is None and changes.moves == {"wrong -> right": 8}


def test_the_reward_of_a_masked_completion_means_nothing() -> None:
    changes = Changes()
    group = a_group(Prompt(ordinal=0, task="t", messages=(), answer="1"))
    masked = tuple(Score(reward=reward, status=RewardStatus.ERROR, reason="failed") for reward in range(4))
    changes.add(1, group.scored(masked), masked[::-1], "1", lambda scores: [0.0] * 4)
    assert not changes.rewards and not changes.moves and not changes.before and not changes.after


def test_the_table_names_examples_and_shows_nothing_raw(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = score(capsys, monkeypatch, str(run), "--steps", "1..3", "data.tasks.0.verifier=integer")
    assert status == 0 and "right -> wrong" in out and "masked" not in out
    assert "sums, step 1, prompt 0, sample 1: right -> wrong: 'The answer is " in out
    assert "\\x1b[2J\\u202e" in out and "\x1b[2J" not in out and "\u202e" not in out
    status, out, _ = score(capsys, monkeypatch, str(run), "--steps", "1..3")
    assert status == 0 and "no verdict would change" in out


def test_the_same_as_json_under_another_recipe(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ("--config", str(run / "config.yaml"), "data.tasks.0.verifier=integer", "learner.groups=2")
    status, out, _ = score(capsys, monkeypatch, str(run), "--steps", "1..3", "--json", *recipe)
    found = json.loads(out)
    assert status == 0 and found["steps"] == "1..3" and list(found["tasks"]) == ["sums", "more"]
    sums = found["tasks"]["sums"]
    assert sums["verdicts"]["right -> wrong"] == 12 and sums["advantages"] == 6
    assert sums["mean_reward"] == {"before": 0.75, "after": 0.25} and len(sums["examples"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0..2"], "has steps 1 to 3"),
        (["--steps", "2..4"], "has steps 1 to 3"),
        (["--steps", "3..2"], "is no range of steps"),
        (["--steps", "1-2"], "is no range of steps"),
        (["--steps", "1..999999999"], "has steps 1 to 3"),
        (["--steps", "1..3", "data.tasks.0.verifier=absent_module:f"], "'absent_module:f' cannot be used"),
        (["--steps", "1..3", "data.tasks.0.verifier=nonsense"], "is neither number, math, integer, text nor module"),
        (["--steps", "1..3", "data.seed=9"], "other prompts than the run's: data.seed differ"),
        (["--steps", "1..3", "data.tasks.1.weight=2"], "data.tasks.1.weight differ"),
        (["--steps", "1..3", "rewards.binary=1"], "did you mean 'binary_at'"),
    ],
)
def test_what_cannot_be_scored_again_is_one_line(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: Sequence[str],
    message: str,
) -> None:
    status, out, err = score(capsys, monkeypatch, str(run), *arguments)
    assert status == 2 and message in err.splitlines()[-1] and not out and "Traceback" not in err


def test_groups_that_are_missing_or_damaged_and_other_prompts_are_refused(run: Path) -> None:
    path = groups.path_of(run / "groups", 2)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"step-000002.jsonl.gz cannot be read"):
        rescore_run(run, "1..3", None, [], None)
    path.unlink()
    with pytest.raises(ConfigError, match=r"not kept the groups of step 2: train with checkpoint.groups=true"):
        rescore_run(run, "1..3", None, [], None)
    with pytest.raises(ValueError, match="is no run's folder"):
        rescore_run(run / "groups", "1..3", None, [], None)
    source = run.parent / "sums.jsonl"
    source.write_text(source.read_text().replace("What is 1 ", "What was 1 "))
    with pytest.raises(ValueError, match="the prompts of task 'sums' differ from the run's"):
        rescore_run(run, "1", None, [], None)
