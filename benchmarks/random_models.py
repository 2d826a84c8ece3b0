"""Models of a given shape with random weights and a tokenizer of one token a character: speed needs no sense."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 model."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    feedforward: int
    vocabulary: int
    tied: bool = True


TINY = Shape(width=128, layers=3, heads=4, kv_heads=2, feedforward=384, vocabulary=512)
SMALL = Shape(width=512, layers=12, heads=8, kv_heads=2, feedforward=1536, vocabulary=4096)
# Qwen2.5-1.5B and 3B.
LARGE = Shape(width=1536, layers=28, heads=12, kv_heads=2, feedforward=8960, vocabulary=151_936)
LARGER = Shape(width=2048, layers=36, heads=16, kv_heads=2, feedforward=11_008, vocabulary=151_936)


def make(folder: Path, shape: Shape, dtype: str = "float32", seed: int = 0, device: str = "cpu") -> Path:
    """Saves a model as an ordinary Hugging Face folder."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.feedforward,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    return folder
