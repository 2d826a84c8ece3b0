"""Answers are shown as they were said: no space is taken out, whatever a tokenizer's files ask for."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from experts.config import CacheConfig, ExpertConfig
from experts.expert import Expert
from experts.loading import load_embeddings, load_frozen, load_tokenizer
from rollout.detokenizer import Detokenizer
from tests.models import make

SAID = "a , b do n't ' x ' we 've . 's ?"
HOUSE = Path(__file__).parents[2]
# Reads a tokenizer only to compare its files; a benchmark's other side.
ELSEWHERE = {"experts/gguf.py", "experts/loading.py", "cluster/zoo/worker.py", "benchmarks/trl_grpo.py"}


def test_nothing_is_cleaned_up_although_the_files_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", "llama")
    assert json.loads((folder / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"] is True
    for frozen in (load_frozen(str(folder)), load_embeddings(str(folder))):
        ids = frozen.tokenizer(SAID)["input_ids"]
        assert frozen.tokenizer.decode(ids) == SAID
        assert frozen.tokenizer.batch_decode([ids, ids]) == [SAID, SAID]
        stream = Detokenizer(frozen.tokenizer, frozen.end_tokens)
        assert "".join(stream.add((token,)) for token in ids) + stream.add((), last=True) == SAID
    expert = Expert(ExpertConfig(name="e", model=str(folder)), str(folder), CacheConfig())
    monkeypatch.setattr(expert.encoder, "answer", lambda rows, limit: [[*ids, 1]] * len(rows))
    assert expert.answer([[{"role": "user", "content": "x"}]], 5) == [SAID]
    assert expert.answer([[{"role": "user", "content": "x"}]], 5, [" do", "b"]) == ["a , "]


def test_word_pieces_are_not_cleaned_up_either(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, ",": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(str(tmp_path)).decode([0, 1, 2]) == "a , b"


def test_every_tokenizer_is_read_in_one_place() -> None:
    """Only there is the cleaning up switched off; no call switches it on again."""
    found = set()
    for room in ("experts", "rollout", "rewards", "learner", "cluster", "benchmarks", "scripts"):
        for path in (HOUSE / room).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            if "Tokenizer" not in source and "clean_up" not in source:
                continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("Tokenizer.from_pretrained"):
                    found.add(str(path.relative_to(HOUSE)))
                if isinstance(node, ast.keyword) and node.arg == "clean_up_tokenization_spaces":
                    assert ast.unparse(node.value) == "False", path
    assert found == ELSEWHERE
