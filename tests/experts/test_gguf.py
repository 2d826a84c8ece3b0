"""GGUF files become what transformers reads from them, to the bit, with the BOS rule; and what is refused."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts import gguf as reading
from experts import sources
from experts.loading import ModelError, check_end_token, describe, load_frozen, stored_sha256
from tests import gguf_files

TOKENS = torch.tensor([[2, 5, 9, 30, 12, 7]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models."""
    monkeypatch.setenv("MUSKETEERS_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF file with quantised weights."""
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny Q8_0.gguf")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_converted_file_is_what_transformers_reads(file: Path, dtype: str) -> None:
    folder = sources.ensure(str(file))
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=getattr(torch, dtype))
    assert torch.equal(logits(load_frozen(folder, dtype).model), logits(read))


def test_it_is_the_model_that_the_file_was_made_from(tmp_path: Path) -> None:
    folder = sources.ensure(str(gguf_files.write(tmp_path / "plain.gguf", quantized=False)))
    frozen, original = load_frozen(folder), gguf_files.model()
    assert (logits(frozen.model) - logits(original)).abs().max() < 1e-5
    assert frozen.end_tokens == (1,) and frozen.pad_id == 0


def test_it_is_an_ordinary_folder_without_a_trace_of_quantisation(file: Path, tmp_path: Path) -> None:
    folder = sources.ensure(str(file))
    said = describe(folder)
    assert (said["architecture"], said["quantized"], said["encoder"]) == ("Gemma3ForCausalLM", None, False)
    check_end_token(folder)
    load_frozen(folder).model.save_pretrained(tmp_path / "again")
    assert stored_sha256(str(tmp_path / "again")) == stored_sha256(folder)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in Path(folder).rglob("*"))


@pytest.mark.parametrize(
    ("metadata", "begins", "ends"),
    [
        ({"add_bos_token": True}, [2], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [2], [1]),
        ({"add_bos_token": None, "add_eos_token": None}, [2], []),  # llama.cpp's own rule for this kind of vocabulary
    ],
)
def test_texts_begin_and_end_as_the_file_says(
    tmp_path: Path, metadata: dict[str, Any], begins: list[int], ends: list[int]
) -> None:
    file = gguf_files.write(tmp_path / "it.gguf", metadata=metadata)
    tokenizer = AutoTokenizer.from_pretrained(sources.ensure(str(file)))
    bare = AutoTokenizer.from_pretrained(tmp_path, gguf_file="it.gguf")
    inside = bare("1+2=?", add_special_tokens=False)["input_ids"]
    assert inside and 3 not in inside
    assert tokenizer("1+2=?")["input_ids"] == begins + inside + ends
    assert tokenizer("1+2=?", add_special_tokens=False)["input_ids"] == inside
    assert tokenizer.decode(inside) == bare.decode(inside)


def test_a_file_is_converted_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"not in the cache of models yet: musketeers fetch .*tiny Q8_0.gguf"):
        sources.resolve(str(file))
    notes: list[str] = []
    folder = sources.ensure(str(file), note=notes.append)
    assert len(notes) == 1 and notes[0].startswith("converting tiny Q8_0.gguf")
    monkeypatch.setattr(reading, "convert", None)
    assert sources.ensure(str(file)) == sources.resolve(str(file)) == folder
    copy = shutil.copy(file, cache.parent / "tiny Q8_0.gguf")
    assert sources.resolve(str(copy)) == folder  # its content counts, not its place


def test_a_conversion_that_fails_leaves_nothing(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    left = cache / "gguf" / f".{sources._converted(file).name}-making-killed"
    left.mkdir(parents=True)
    monkeypatch.setattr(reading, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        sources.ensure(str(file))
    assert [path.suffix for path in (cache / "gguf").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"PK\3\4", r"bad.gguf' is not a GGUF file: give one, or a Hugging Face folder"),
        (b"GGUF\3\0\0\0", r"bad.gguf' cannot be read .*: is it whole\? Compare its size and hash"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        sources.ensure(str(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(file: Path, tmp_path: Path, share: float) -> None:
    whole = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"cut.gguf' cannot be read .*: is it whole\?"):
        sources.ensure(str(tmp_path / "cut.gguf"))
    assert not list((tmp_path / "models" / "gguf").glob("cut*"))


def test_an_architecture_that_transformers_does_not_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(file.read_bytes().replace(b"gemma3", b"zoomx9"))
    with pytest.raises(ModelError, match=r"other.gguf': transformers does not read the architecture 'zoomx9'"):
        sources.ensure(str(tmp_path / "other.gguf"))


def test_a_file_without_one_of_the_weights(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "gap.gguf", leave_out="blk.1.ffn_up")
    with pytest.raises(ModelError, match=r"gap.gguf': transformers finds no model.layers.1.mlp.up_proj.weight"):
        sources.ensure(str(file))


def test_no_room(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    with pytest.raises(ModelError, match=r"models.gguf has 0.0 GB free, .* set MUSKETEERS_MODELS to a folder"):
        sources.ensure(str(file))


def test_without_the_package_that_reads_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package gguf: pip install gguf"):
        sources.ensure(str(file))
