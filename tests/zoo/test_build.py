from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer

from cluster.zoo import build as building
from cluster.zoo.build import build
from cluster.zoo.paths import ensure, is_zoo, resolve, world_folder, worlds_named_by
from cluster.zoo.recipe import Recipe, ZooError
from tests.zoo.conftest import FOLDER


@pytest.fixture
def copy(built: Path, recipe: Recipe, tmp_path: Path, tiny_is_known: None) -> Path:
    """A copy of the built zoo to damage; returns the tiny world's folder."""
    shutil.copytree(built, tmp_path / "zoo")
    return tmp_path / "zoo" / recipe.folder


def test_models_load_as_any_hugging_face_folder(built: Path, recipe: Recipe, tiny_is_known: None) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kinds = {"plus": "GPTNeoXForCausalLM", "twice": "LlamaForCausalLM", "policy": "Qwen2ForCausalLM"}
    manifest = json.loads((world_folder(recipe, built) / "zoo.json").read_text())
    text = "Problem 1: What is 3 plus 4?\n\nTake 12 legs.\nAnswer:"
    for name, kind in kinds.items():
        folder = resolve(f"zoo/tiny/{name}", built)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert type(model).__name__ == kind
        assert sum(p.numel() for p in model.parameters()) == manifest["models"][name]["parameters"]
        assert tokenizer.encode(text) == Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
        assert tokenizer.encode("12") == [tokenizer.convert_tokens_to_ids("12")]
        assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.generation_config.eos_token_id
        assert len(tokenizer) == model.config.vocab_size
        assert tokenizer.chat_template is None


def test_cards_give_the_measured_accuracies(built: Path, recipe: Recipe) -> None:
    folder = world_folder(recipe, built)
    accuracy = json.loads((folder / "zoo.json").read_text())["models"]["policy"]["accuracy"]
    assert {kind: set(row) for kind, row in accuracy.items()} == {
        kind: {"plus", "twice", "both"} for kind in ("no_hint", "right_hint", "experts_hint")
    }
    card = (folder / "policy" / "README.md").read_text()
    assert f"| with the right hint | {accuracy['right_hint']['both']:.3f} |" in card
    assert "fingerprint " + recipe.fingerprint in card


def test_a_second_build_does_nothing(built: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_build_into", _fail)
    assert build(FOLDER / "tiny.yaml", built, progress=False) == world_folder(recipe, built)


def test_ensure_takes_the_root_from_the_environment(
    built: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tiny_is_known: None
) -> None:
    monkeypatch.setenv("MUSKETEERS_ZOO", str(built))
    assert ensure("tiny") == built / recipe.folder


def _fail(*args: object) -> None:
    raise RuntimeError("builds")


def test_a_forced_build_that_fails_keeps_the_old_world(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_build_into", _fail)
    with pytest.raises(RuntimeError, match="builds"):
        build("tiny", copy.parent, force=True, progress=False)
    assert resolve("zoo/tiny/policy", copy.parent).is_dir()
    assert [entry.name for entry in copy.parent.iterdir() if "building" in entry.name] == []


def test_a_forced_build_replaces_a_damaged_world(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = copy.parent.parent / "whole"
    shutil.copytree(copy, whole)
    (copy / "policy" / "config.json").unlink()
    monkeypatch.setattr(building, "_build_into", lambda into, *rest: shutil.copytree(whole, into, dirs_exist_ok=True))
    build("tiny", copy.parent, force=True, progress=False)
    assert resolve("zoo/tiny/policy", copy.parent).is_dir()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (_truncate, "policy/model.safetensors", "is cut short: policy/model.safetensors"),
        (_truncate, "zoo.json", "is cut short: its zoo.json"),
        (_change, "plus/model.safetensors", "was changed: plus/model.safetensors"),
        (Path.unlink, "twice/tokenizer.json", "is incomplete: twice/tokenizer.json"),
    ],
)
def test_a_damaged_world_is_refused_with_the_remedy(copy: Path, damage: object, name: str, message: str) -> None:
    resolve("zoo/tiny/policy", copy.parent)
    damage(copy / name)  # type: ignore[operator]
    for attempt in (lambda: resolve("zoo/tiny/policy", copy.parent), lambda: ensure("tiny", copy.parent)):
        with pytest.raises(ZooError, match=message) as caught:
            attempt()
        assert str(copy) in str(caught.value) and "run musketeers zoo build tiny --force" in str(caught.value)


def test_names() -> None:
    assert is_zoo("zoo/composed/policy") and not is_zoo("Qwen/Qwen2.5-3B-Instruct") and not is_zoo("./zoo/composed")
    assert worlds_named_by(["zoo/composed/policy", "zoo/composed/chain_sum", "gpt2"]) == {"composed"}
    with pytest.raises(ZooError, match=r"known are .*composed"):
        worlds_named_by(["zoo/nowhere/policy"])
    with pytest.raises(ZooError, match="zoo/<world>/<model>"):
        resolve("zoo/composed")


def test_a_name_of_no_built_model_is_refused(built: Path, tmp_path: Path, tiny_is_known: None) -> None:
    with pytest.raises(ZooError, match="has no model 'minus': it has policy, plus, twice"):
        resolve("zoo/tiny/minus", built)
    with pytest.raises(ZooError, match=r"is not built .*: run musketeers zoo build tiny$"):
        resolve("zoo/tiny/policy", tmp_path)


def test_a_worker_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    text = (FOLDER / "tiny.yaml").read_text().replace("plugin:Twice", "plugin:Thrice")
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(ZooError, match=r"zoo worker for '\w+' failed \(exit code 1\): .*has no class 'Thrice'"):
        build(tmp_path / "broken.yaml", tmp_path / "zoo", progress=False)
    assert [entry for entry in (tmp_path / "zoo").iterdir() if entry.is_dir()] == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_leaves_nothing_that_could_be_taken_for_whole(
    tmp_path: Path, how: signal.Signals, tiny_is_known: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A shell that starts things in the background has them ignore Ctrl-C; a terminal does not.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from cluster.zoo.build import build; build({str(FOLDER / 'tiny.yaml')!r}, progress=False)"
    environment = os.environ | {"MUSKETEERS_ZOO": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL) as process:
        workers = _workers(process.pid)
        process.send_signal(how)
        assert process.wait(60) != 0
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    with pytest.raises(ZooError, match="is not built"):
        resolve("zoo/tiny/policy", tmp_path)
    if how == signal.SIGINT:
        assert [entry for entry in tmp_path.iterdir() if entry.is_dir()] == []
    monkeypatch.setattr(building, "_build_into", lambda into, *rest: None)
    build(FOLDER / "tiny.yaml", tmp_path, progress=False)  # the lock of the killed one does not hold it up
    assert [entry.name for entry in tmp_path.iterdir() if "-building-" in entry.name] == []


def _workers(pid: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        workers = psutil.Process(pid).children()
        if len(workers) == 2:
            return workers
        time.sleep(0.05)
    raise AssertionError("the build did not start two workers")
