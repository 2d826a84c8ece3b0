"""What a user does wrong ends in one line with the remedy and exit status 2, before anything expensive starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster import cli
from cluster.config import ConfigError, load
from cluster.run.recovery import RunError
from cluster.run.session import Outcome, Session
from cluster.run.training import train
from tests.e2e.conftest import Runs
from tests.models import make
from tests.pipeline.test_mirror import contents


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The one line that the command prints on these arguments."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["musketeers", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2, shown
    assert "Traceback" not in shown.err and shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    return shown.err


CASES = {
    "unknown key": ("learner.lerning_rate=1", "learning_rate"),
    "unknown task": ("data.tasks=[{name: t, dataset: chain_sun}]", "chain_sum"),
    "unknown model": ("policy.model=/nowhere/at/all", "policy.model"),
    "unknown layer": ("experts.0.layer=99", "experts.0.layer"),
    "unknown world": ("policy.model=zoo/compossed/policy", "composed"),
    "empty task list": ("data.tasks=[]", "data.tasks is empty"),
    "group size 1": ("sampling.samples=1", "sampling.samples"),
    "no such router": ("router.init=/nowhere", "router.init"),
    "no such plug-in": ("router.kind=nowhere:Router", "router.kind"),
    "not an override": ("seed", "key=value"),
    "no such item": ("experts.7.model=x", "experts has"),
    "ZeRO 3": ("learner.zero_stage=3", "ZeRO 3"),
}


@pytest.mark.parametrize(("override", "named"), CASES.values(), ids=CASES.keys())
def test_bad_values_are_refused(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, override: str, named: str
) -> None:
    assert named in refused(capsys, monkeypatch, "train", str(runs.recipe), override)
    assert not (runs.folder / "runs" / "run").exists()


def test_a_run_that_its_cluster_refuses_leaves_its_name_free(runs: Runs) -> None:
    config = load(runs.recipe, ["execution=ray", "policy.gpus=1"])
    with pytest.raises(ConfigError, match=r"ask for 1 GPUs .* and the cluster has 0"):
        train(config, resume=False, overwrite=False, console=Console(quiet=True))
    assert not (runs.folder / "runs" / "run").exists()


def test_an_existing_run_folder_is_refused(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.folder / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    assert "--overwrite" in refused(capsys, monkeypatch, "train", str(runs.recipe))
    assert "no config.yaml" in refused(capsys, monkeypatch, "train", str(runs.recipe), "--overwrite")
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_resume_that_would_change_what_is_computed_is_refused(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs.folder / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load(runs.recipe).as_yaml())
    assert "sampling.temperature" in refused(
        capsys, monkeypatch, "train", str(runs.recipe), "sampling.temperature=0.5", "--resume"
    )
    broken = folder / "checkpoints" / "step-000004"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text('{"step": 4, "files": {"router.safetensors": ""}}')
    assert "is missing or damaged" in refused(capsys, monkeypatch, "train", str(runs.recipe), "--resume")


def test_a_full_disk_is_refused(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run.folder.NEEDED_BYTES", 2**80)
    assert "no disk space" in refused(capsys, monkeypatch, "train", str(runs.recipe))


def _without_end_token(folder: Path) -> None:
    make(folder, "qwen2", end=False)


def _without_weights(folder: Path) -> None:
    make(folder, "qwen2")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(("break_it", "named"), [(_without_end_token, "end token"), (_without_weights, "no weights")])
def test_a_broken_policy_is_refused(
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    break_it: Callable[[Path], None],
    named: str,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    break_it(tmp_path / "broken")
    assert named in refused(capsys, monkeypatch, "train", str(runs.recipe), f"policy.model={tmp_path / 'broken'}")


def test_a_template_that_takes_no_system_message_and_a_model_of_more_than_text_are_refused_by_key(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = make(tmp_path / "strict", "llama", width=24)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}hello"
    (strict / "chat_template.jinja").write_text(refusing)
    system = ["data.tasks=[{name: sums, dataset: chain_sum, size: 100}]", "data.system=default"]
    for key, remedy in (
        ("experts.1", 'experts.1.system: "" leaves out'),
        ("policy", "without data.system there is no"),
    ):
        said = refused(capsys, monkeypatch, "train", str(runs.recipe), f"{key}.model={strict}", *system)
        assert f"{key}.model" in said and "no system role" in said and remedy in said
    picture = make(tmp_path / "picture", "llama", width=24)
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    (picture / "config.json").write_text(json.dumps(config))
    said = refused(capsys, monkeypatch, "train", str(runs.recipe), f"experts.0.model={picture}")
    assert str(picture) in said and "take a text-only sibling" in said


def test_the_quickstart_recipe_fits_one_screen_and_is_synchronous() -> None:
    text = Path("configs/quickstart.yaml").read_text()
    assert len(text.splitlines()) <= 40
    assert yaml.safe_load(text)["max_staleness"] == 0


@pytest.mark.parametrize("how", ["--resume", "--auto-resume"])
@pytest.mark.parametrize("lost", ["missing", "empty", "a file", "without a manifest"])
def test_lost_checkpoints_are_refused_and_nothing_is_truncated(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str, lost: str
) -> None:
    folder = runs.folder / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load(runs.recipe).as_yaml())
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "eval.jsonl").write_text('{"step": 0, "kind": "before"}\n')
    checkpoints = folder / "checkpoints"
    if lost == "a file":
        checkpoints.write_text("")
    elif lost != "missing":
        checkpoints.mkdir()
    if lost == "without a manifest":
        (checkpoints / "step-000004").mkdir()
        (checkpoints / "step-000004" / "router.safetensors").write_text("")
    before = contents(folder)
    said = refused(capsys, monkeypatch, "train", str(runs.recipe), how)
    assert "metrics.jsonl, eval.jsonl" in said and str(checkpoints) in said and "--overwrite or run=NAME" in said
    assert contents(folder) == before


@pytest.mark.parametrize("ends", [ConfigError("no"), RunError("no"), OSError(28, "no"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_run_that_ends_before_its_first_checkpoint_has_replaced_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, ends: BaseException, overwrite: bool
) -> None:
    folder = runs.folder / "runs" / "run"
    if overwrite:
        (folder / "checkpoints" / "step-000004").mkdir(parents=True)
        (folder / "config.yaml").write_text(load(runs.recipe, ["steps=9"]).as_yaml())
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(folder)

    async def end(session: Session) -> Outcome:
        assert sorted(contents(folder)) == ["config.yaml", "data.json"]
        raise ends

    monkeypatch.setattr(Session, "run", end)
    with pytest.raises(type(ends)):
        train(load(runs.recipe), resume=False, overwrite=overwrite, console=Console(quiet=True))
    if overwrite or isinstance(ends, ConfigError):
        assert contents(folder) == before
    else:
        with pytest.raises(type(ends)):  # it has logged nothing, and may begin anew
            train(load(runs.recipe), resume=True, overwrite=False, console=Console(quiet=True))
        assert sorted(contents(folder)) == ["config.yaml", "data.json"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["run"] * folder.exists() + ["run.lock"]
