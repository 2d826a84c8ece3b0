"""The copy of a run at a URL: complete, and in an order that no interruption spoils."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.config import ConfigError
from cluster.run.folder import RunFolder
from cluster.run.mirror import Mirror


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a run in it."""
    folder = tmp_path / "here" / "run"
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/step-1/manifest.json", "checkpoints/step-1/router.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_the_copy_follows_the_folder(run: Path, tmp_path: Path) -> None:
    mirror = Mirror(f"file://{tmp_path}/there", "run", run)
    assert mirror.push() == 4 and mirror.push() == 0
    (run / "metrics.jsonl").write_text("more of it")
    shutil.move(run / "checkpoints" / "step-1", run / "checkpoints" / "step-2")
    (run / ".partial").write_text("half written")
    assert mirror.push() == 3
    (run / ".partial").unlink()
    assert contents(tmp_path / "there" / "run") == contents(run)
    assert Mirror(f"file://{tmp_path}/there", "run", tmp_path / "elsewhere").pull()
    assert contents(tmp_path / "elsewhere") == contents(run)


def test_a_checkpoint_s_manifest_is_copied_last_and_removed_first(run: Path, tmp_path: Path, monkeypatch) -> None:
    mirror = Mirror(f"file://{tmp_path}/there", "run", run)
    done: list[str] = []
    for name in ("put_file", "rm_file"):
        real = getattr(mirror._files, name)
        monkeypatch.setattr(mirror._files, name, lambda *a, real=real: done.append(Path(a[-1]).name) or real(*a))
    mirror.push()
    assert done[-1] == "manifest.json"
    done.clear()
    shutil.rmtree(run / "checkpoints")
    mirror.push()
    assert done == ["manifest.json", "router.bin"]


def test_storage_that_fails_is_said_and_tried_again(run: Path, tmp_path: Path, monkeypatch) -> None:
    mirror = Mirror(f"file://{tmp_path}/there", "run", run)
    folder, notes = RunFolder(run, mirror), []
    with monkeypatch.context() as broken:
        broken.setattr(mirror._files, "put_file", lambda *_: (_ for _ in ()).throw(RuntimeError("no credentials")))
        folder.shared(notes.append)
    assert len(notes) == 1 and "no credentials" in notes[0] and str(run) in notes[0]
    folder.share(notes.append)
    folder.shared(notes.append)
    assert len(notes) == 1 and contents(tmp_path / "there" / "run") == contents(run)


@pytest.mark.parametrize("ahead", ["here", "there"])
def test_whoever_has_got_further_stays(run: Path, tmp_path: Path, ahead: str) -> None:
    """Storage that failed for a while must not take back what this machine's disk has."""
    mirror = Mirror(f"file://{tmp_path}/there", "run", run)
    mirror.push()
    newer = {"here": run, "there": tmp_path / "there" / "run"}[ahead] / "checkpoints" / "step-2"
    newer.mkdir()
    (newer / "manifest.json").write_text("newer")
    assert mirror.pull() == (ahead == "there")
    assert (run / "checkpoints" / "step-2" / "manifest.json").read_text() == "newer"


def test_a_url_that_cannot_be_written_is_refused_before_anything_starts(run: Path, tmp_path: Path, monkeypatch) -> None:
    mirror = Mirror(f"file://{tmp_path}/there", "run", run)
    mirror.check()
    assert [path.name for path in (tmp_path / "there").iterdir()] == []

    def refuse(*_: object) -> None:
        raise RuntimeError("AccessDenied")

    monkeypatch.setattr(mirror._files, "pipe_file", refuse)
    with pytest.raises(ConfigError, match=r"root: file://.*/there/run cannot be used: RuntimeError: AccessDenied"):
        mirror.check()


def test_a_url_that_nothing_opens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root: nosuch://bucket/runs cannot be opened"):
        Mirror("nosuch://bucket/runs", "run", tmp_path)
