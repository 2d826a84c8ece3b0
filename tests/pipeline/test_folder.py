"""A run's folder: nothing is lost to a new start, whatever ends it, and no other prompts are taken for its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.config import RunConfig, parse
from cluster.run import checkpoint, groups, training
from cluster.run.afterwards import replay_step
from cluster.run.folder import RunFolder, RunFolderError
from cluster.run.mirror import Mirror
from rewards.sources import Task
from rewards.stream import PromptStream
from rewards.verify import RewardsError
from rollout.sequence import LAYOUT
from tests.pipeline.runs import made_up_run, settings
from tests.pipeline.test_mirror import contents
from tests.rewards.verifiers import a_prompt


def config_of(root: Path, **changes: Any) -> RunConfig:
    """The recipe of `made_up_run`."""
    return parse(settings(root, **changes), "test")


def started(root: Path, overwrite: bool) -> RunFolder:
    """The run's folder after a start that was not refused; as another process sees it."""
    config = config_of(root)
    folder = RunFolder.of(config)
    folder.check(config, resume=False, overwrite=overwrite)
    folder.prepare(config, overwrite)
    return folder


def checkpointed(folder: RunFolder) -> None:
    """As after a run's first checkpoint and update."""
    (folder.checkpoints / "step-000000").mkdir(parents=True)
    (folder.checkpoints / "step-000000" / "manifest.json").write_text("{}")
    folder.accept()
    folder.metrics.write_text('{"step": 1}\n')


@pytest.mark.parametrize("refused", [True, False])
def test_what_is_replaced_is_there_again_when_its_successor_ends_without_a_checkpoint(
    tmp_path: Path, refused: bool
) -> None:
    old = contents(made_up_run(tmp_path))
    folder = started(tmp_path, overwrite=True)
    assert sorted(contents(folder.path)) == ["config.yaml"]
    folder.withdraw(refused)
    assert contents(folder.path) == old and not folder.replaced.exists()
    folder.withdraw(refused)
    assert contents(folder.path) == old


def test_what_is_replaced_goes_with_its_successor_s_first_checkpoint(tmp_path: Path) -> None:
    made_up_run(tmp_path)
    folder = started(tmp_path, overwrite=True)
    checkpointed(folder)
    assert not folder.replaced.exists()
    new = contents(folder.path)
    folder.withdraw(refused=True)
    assert contents(folder.path) == new, "it has a checkpoint"


def test_a_kill_in_between_leaves_both_and_every_next_start_says_where(tmp_path: Path) -> None:
    old = contents(made_up_run(tmp_path))
    folder = started(tmp_path, overwrite=True)
    notes: list[str] = []
    RunFolder.of(config_of(tmp_path)).note_leftover(notes.append)
    assert len(notes) == 1 and str(folder.replaced) in notes[0] and "move or delete it" in notes[0]
    with pytest.raises(RunFolderError, match=r"exists: continue .*\.trio\.replaced is the run that an interrupted"):
        started(tmp_path, overwrite=False)
    again = started(tmp_path, overwrite=True)
    assert contents(again.replaced) == old, "not what was killed, which had no checkpoint"
    again.withdraw(refused=False)
    assert contents(again.path) == old
    folder = started(tmp_path, overwrite=True)
    shutil.rmtree(folder.path)  # or killed before there was a new folder
    with pytest.raises(RunFolderError, match=r"nothing to resume; .*\.trio\.replaced is the run"):
        folder.check(config_of(tmp_path), resume=True, overwrite=False)
    started(tmp_path, overwrite=True).withdraw(refused=True)
    assert contents(folder.path) == old


def test_a_kill_after_the_first_checkpoint_leaves_the_new_run_to_be_replaced(tmp_path: Path) -> None:
    made_up_run(tmp_path)
    folder = started(tmp_path, overwrite=True)
    shutil.copytree(folder.replaced, tmp_path / "kept")
    checkpointed(folder)
    shutil.move(tmp_path / "kept", folder.replaced)
    new = contents(folder.path)
    started(tmp_path, overwrite=True).withdraw(refused=True)
    assert contents(folder.path) == new


def _of_another_run(folder: Path) -> None:
    (folder / "config.yaml").write_text(config_of(folder, run="other").as_yaml())


def _of_no_run(folder: Path) -> None:
    (folder / "config.yaml").write_text("title: my thesis\n")


def _damaged(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"run: [\xff")


def _without(folder: Path) -> None:
    (folder / "config.yaml").unlink()


def _linked(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("spoil", [_of_another_run, _of_no_run, _damaged, _without, _linked])
def test_what_is_no_run_of_this_name_is_not_overwritten(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = made_up_run(tmp_path)
    (folder / "thesis.tex").write_text("years of work")
    spoil(folder)
    before = contents(folder)
    with pytest.raises(RunFolderError, match="not overwritten") as refusal:
        started(tmp_path, overwrite=True)
    assert "\n" not in str(refusal.value)
    assert contents(folder) == before and folder.is_symlink() == (spoil is _linked)


def test_a_refused_start_removes_what_it_has_made_and_nothing_else(tmp_path: Path) -> None:
    folder = started(tmp_path, overwrite=False)
    folder.withdraw(refused=True)
    assert not folder.path.exists()
    started(tmp_path, overwrite=False)  # killed
    again = RunFolder.of(config_of(tmp_path))
    (again.path / "notes.txt").write_text("mine")
    again.prepare(config_of(tmp_path), overwrite=False)  # goes on
    again.withdraw(refused=True)
    assert sorted(contents(again.path)) == ["config.yaml", "notes.txt"]


def test_the_copy_at_a_url_is_the_old_run_s_until_the_new_one_has_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUSKETEERS_STAGING", str(tmp_path / "here"))
    there, url = tmp_path / "there" / "trio", f"file://{tmp_path}/there"
    made = made_up_run(tmp_path / "made")
    (made / "config.yaml").write_text(parse(settings(tmp_path) | {"root": url}, "test").as_yaml())
    config = parse(settings(tmp_path) | {"root": url}, "test")
    Mirror(url, "trio", made).push()
    old, said = contents(there), list[str]()
    for ends in ("refused", "accepted"):
        folder = RunFolder.of(config)
        folder.check(config, resume=False, overwrite=True)
        folder.prepare(config, overwrite=True)
        folder.share(said.append)
        folder.shared(said.append)
        assert contents(there) == old
        if ends == "refused":
            folder.withdraw(refused=True)
            folder.shared(said.append)
            assert contents(there) == old
    checkpointed(folder)
    folder.shared(said.append)
    assert contents(there) == contents(folder.path) and not said
    (there / "config.yaml").write_text("title: my thesis\n")
    with pytest.raises(RunFolderError, match=r"file://.*/there/trio is no run's folder .*: not overwritten"):
        folder.check(config, resume=False, overwrite=True)
    (there / "config.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"file://.*/there/trio is no run's folder .*: not overwritten"):
        folder.check(config, resume=False, overwrite=True)


def test_a_copy_that_was_cleared_by_half_has_no_checkpoint_to_go_on_from(tmp_path: Path, monkeypatch) -> None:
    folder = made_up_run(tmp_path / "here")
    mirror = Mirror(f"file://{tmp_path}/there", "trio", folder)
    mirror.push()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror._files, "rm", killed)
    mirror.replace()
    with pytest.raises(KeyboardInterrupt):
        mirror.push()
    left = contents(tmp_path / "there" / "trio")
    assert "config.yaml" in left and not [name for name in left if name.endswith("manifest.json")]


LOGS = (
    "start.json",
    "metrics.jsonl",
    "eval.jsonl",
    "dead_letters.jsonl",
    "summary.json",
    "groups/step-000001.jsonl.gz",
)


@pytest.mark.parametrize("log", LOGS)
def test_a_run_that_has_logged_anything_has_had_a_checkpoint(tmp_path: Path, log: str) -> None:
    folder = started(tmp_path, overwrite=False)
    folder.metrics.touch()
    folder.check_lost()
    (folder.path / log).parent.mkdir(exist_ok=True)
    (folder.path / log).write_text("{}")
    folder.checkpoints.mkdir()
    with pytest.raises(RunFolderError, match=f"has {log.split('/')[0]}, and .*checkpoints holds no checkpoint: put"):
        folder.check_lost()


def stream_of(root: Path, *texts: str) -> PromptStream:
    """A stream of a task with these prompts."""
    data = config_of(root).data
    pool = tuple(replace(a_prompt("digits", text), ordinal=n) for n, text in enumerate(texts))
    return PromptStream({"digits": Task("digits", data.tasks[0], pool, (), (), verifier=None)}, data)  # type: ignore[arg-type]


def test_other_prompts_than_a_run_s_are_refused(tmp_path: Path) -> None:
    folder, mine = started(tmp_path, overwrite=False), stream_of(tmp_path, "a", "b")
    notes: list[str] = []
    folder.write_data(mine)
    folder.check_data(stream_of(tmp_path, "a", "b"), {}, notes.append)
    assert not notes
    with pytest.raises(RewardsError, match="the prompts of task 'digits' differ from the run's: put back its file"):
        folder.check_data(stream_of(tmp_path, "a", "c"), {"stream": mine.state()}, notes.append)
    folder.data.write_text(folder.data.read_text()[:-20])
    with pytest.raises(RunFolderError, match=r"data\.json is damaged"):
        folder.check_data(mine, {}, notes.append)


def test_a_run_of_before_says_so_and_its_checkpoint_s_digests_count(tmp_path: Path) -> None:
    folder, mine = started(tmp_path, overwrite=False), stream_of(tmp_path, "a", "b")
    notes: list[str] = []
    folder.check_data(mine, json.loads(json.dumps({"stream": mine.state()})), notes.append)
    assert "kept no digests of its prompts (data.json): those of its checkpoint are compared" in notes.pop()
    with pytest.raises(RewardsError, match="the prompts of task 'digits' differ"):
        folder.check_data(stream_of(tmp_path, "a", "c"), {"stream": mine.state()}, notes.append)
    notes.clear()
    folder.check_data(mine, {}, notes.append)
    assert "whether they are the same is not known" in notes.pop() and folder.pools() == {}


def test_a_config_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    folder = started(tmp_path, overwrite=False)
    folder.config.write_text("run: [")
    with pytest.raises(RunFolderError, match=r"config\.yaml is damaged"):
        folder.saved_config()


def test_a_run_of_another_layout_is_not_gone_on_with_and_its_router_can_be_read_still(tmp_path: Path) -> None:
    folder = RunFolder(made_up_run(tmp_path))
    assert checkpoint.read_to_train(folder.checkpoints).layout == LAYOUT
    for manifest in folder.checkpoints.glob("*/manifest.json"):
        values = json.loads(manifest.read_text())
        assert values.pop("layout") == LAYOUT
        manifest.write_text(json.dumps(values))
    folder.metrics.write_text('{"step": 4}\n')
    for step in (3, 4):
        groups.path_of(folder.groups, step).parent.mkdir(exist_ok=True)
        groups.path_of(folder.groups, step).touch()
    for go_on in (lambda: training._saved(folder), lambda: replay_step(folder.path, 4, Console(quiet=True))):
        with pytest.raises(checkpoint.CheckpointError, match=r"trio was trained .*\(layout 1, .* start anew"):
            go_on()
    assert checkpoint.read(folder.checkpoints).step == 4
