"""Encoders as experts: states of all tokens, pooled as published, inside their own limits; they never answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

from experts.architectures import policy_refusal
from experts.bidirectional import is_encoder
from experts.config import CacheConfig, ExpertConfig
from experts.expert import Expert
from experts.loading import ModelError, check_end_token, describe, load_frozen, weights_sha256
from tests.models import CHARACTERS, make

TEXTS = ["12 + 34 =", "ab", "a longer text of many tokens"]


def make_bert(folder: Path) -> Path:
    """A tiny random BERT whose file holds a masked language model, and so no pooler."""
    special = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": 4}
    vocabulary = special | {c: i + len(special) for i, c in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.3, **shape)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder."""
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


def expert(folder: Path, **settings: object) -> Expert:
    config = ExpertConfig.model_validate({"name": "it", "model": str(folder), "norm": "none"} | settings)
    return Expert(config, str(folder), CacheConfig())


def encoded(folder: Path, texts: list[str], **settings: object) -> list[np.ndarray]:
    return list(expert(folder, **settings).encode([({"role": "user", "content": text},) for text in texts]).features)


def states(folder: Path, text: str) -> np.ndarray:
    """All of a text's last hidden states, alone."""
    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = torch.tensor([load_frozen(str(folder)).tokenizer(text)["input_ids"]])
        return model(input_ids=tokens).last_hidden_state[0].numpy()


def test_pools(bert: Path) -> None:
    """As sentence-transformers publishes them: the mean of the last states over the mask, or the first of them."""
    for how, pooled in (
        ("mean", lambda s: s.mean(axis=0, keepdims=True)),
        ("first", lambda s: s[:1]),
        ("last", lambda s: s[-1:]),
        ("last_k", lambda s: s[-3:]),
    ):
        for text, found in zip(TEXTS, encoded(bert, TEXTS, pool=how, last_k=3), strict=True):
            assert np.abs(found - pooled(states(bert, text))).max() < 1e-5, (how, text)


def test_the_first_state_differs_from_prompt_to_prompt(bert: Path) -> None:
    one, two, _ = encoded(bert, TEXTS, pool="first")
    assert np.abs(one - two).max() > 0.01


def test_a_long_prompt_keeps_what_the_tokenizer_puts_around_it(bert: Path) -> None:
    it = expert(bert, max_tokens=6)
    for text, inside in (("abcdefgh", "efgh"), ("abcd", "abcd"), ("a", "a"), ("", "")):
        found = it.read(({"role": "user", "content": text},)).tokens
        assert found == [1, *it.frozen.tokenizer(inside, add_special_tokens=False)["input_ids"], 2]
    forged = it.read(({"role": "user", "content": "[SEP]a"},)).tokens
    assert (forged[0], forged[-1]) == (1, 2) and 2 not in forged[1:-1]  # also where a text spells them out


def test_what_is_said_of_it(bert: Path) -> None:
    said = describe(str(bert))
    wanted = {"architecture": "BertForMaskedLM", "encoder": True, "longest": 64, "hidden_size": 32}
    assert said | wanted == said
    check_end_token(str(bert))
    info = expert(bert).info()
    assert info["width"] == 32 and info["answers"] is False


def test_it_is_the_same_model_whenever_it_is_loaded(bert: Path) -> None:
    """Its file has no pooler, which transformers would draw at random."""
    one, two = load_frozen(str(bert)), load_frozen(str(bert))
    assert weights_sha256(one.model) == weights_sha256(two.model) and one.fingerprint() == two.fingerprint()
    untrained = load_frozen(str(bert), untrained=True)
    assert weights_sha256(untrained.model) == weights_sha256(load_frozen(str(bert), untrained=True).model)
    assert weights_sha256(untrained.model) != weights_sha256(one.model)


@pytest.mark.parametrize(
    ("build", "lost"),
    [(make_bert, "layer.1.output.dense.bias"), (partial(make, family="llama"), "mlp.down_proj.weight")],
)
def test_a_file_that_lacks_weights_is_refused(build: Callable[[Path], Path], lost: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = build(tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith(lost))]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"cannot be loaded: its files hold no .*{lost}"):
        load_frozen(str(copy))


def test_it_is_never_asked_for_answers(bert: Path) -> None:
    with pytest.raises(ModelError, match="expert 'it' is an encoder, which reads and cannot answer"):
        expert(bert).answer([({"role": "user", "content": "a"},)], 4)


@pytest.mark.parametrize(
    ("config", "encoder"),
    [
        (BertConfig(), True),
        (RobertaConfig(), True),
        (DistilBertConfig(), True),
        (ModernBertConfig(), True),
        (Gemma3TextConfig(use_bidirectional_attention=True), True),
        (BertConfig(is_decoder=True), False),
        (Gemma3TextConfig(), False),
        (LlamaConfig(), False),
        (Qwen3Config(), False),
        (GPT2Config(), False),
        (BartConfig(), False),
        (T5Config(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_models_are_encoders(config: object, encoder: bool) -> None:
    assert is_encoder(config) is encoder
    assert not encoder or policy_refusal(config) == "it is an encoder, which reads and cannot write"
