"""Tiny random models of three families, saved as ordinary Hugging Face folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ +-*=?.,:\n'"


def tokenizer(end: bool = True) -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>" if end else None
    )


def by_pieces(pieces: Sequence[str], decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """As many tokens as `tokenizer` has: these pieces, and then single characters; it is there to decode."""
    vocabulary = list(
        dict.fromkeys(["<pad>", "<eos>", "<unk>", *pieces, *CHARACTERS.replace("\n", "").replace(" ", "")])
    )
    named = {piece: index for index, piece in enumerate(vocabulary[: len(CHARACTERS) + 3])}
    backend = Tokenizer(models.WordLevel(named, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def make(
    folder: Path,
    family: str,
    width: int = 32,
    layers: int = 2,
    seed: int = 0,
    end: bool = True,
    tokens: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Saves a random model with its tokenizer; weights large enough that outputs depend on inputs."""
    tokens = tokenizer(end) if tokens is None else tokens
    # Most tokenizers of the hub ask for it; nothing of ours may do as they ask.
    tokens.clean_up_tokenization_spaces = True
    tokens.init_kwargs["clean_up_tokenization_spaces"] = True
    shared = {
        "vocab_size": len(tokens),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "pad_token_id": 0,
        "eos_token_id": 1 if end else None,
    }
    classes = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
        "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    }
    config_class, model_class, extra = classes[family]
    torch.manual_seed(seed)
    model_class(config_class(**shared, **extra)).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
