"""A tiny Gemma 3 as a GGUF file, written by the package `gguf` as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+=?."
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TOKENS = [*CONTROL, "▁", *LETTERS]
WIDTH, LAYERS = 64, 2


def model(seed: int = 0) -> Gemma3ForCausalLM:
    """The model that the file is made from."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=16,
        initializer_range=0.2,
    )
    return Gemma3ForCausalLM(config)


def write(file: Path, quantized: bool = True, metadata: dict[str, Any] | None = None, leave_out: str = "-") -> Path:
    """The file.  quantized: matrices as Q8_0; metadata: of the tokenizer; leave_out: tensors whose names hold this."""
    writer = gguf.GGUFWriter(file, "gemma3")
    config = model().config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(1e6)
    said = {"model": "llama", "add_bos_token": True, "add_eos_token": False} | (metadata or {})
    writer.add_tokenizer_model(said["model"])
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(index) for index in range(len(TOKENS))])
    writer.add_token_types([3 if token in CONTROL else 1 for token in TOKENS])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    for name in ("add_bos_token", "add_eos_token"):
        if said[name] is not None:
            getattr(writer, f"add_{name}")(said[name])
    _add_tensors(writer, quantized, leave_out)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tensors(writer: gguf.GGUFWriter, quantized: bool, leave_out: str) -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, LAYERS)
    for name, tensor in model().state_dict().items():
        if name == "lm_head.weight":  # the embeddings, as llama.cpp has it
            continue
        base, _, suffix = name.rpartition(".")
        called = f"{names.get_name(base)}.{suffix}"
        values = (tensor + 1 if name.endswith("norm.weight") else tensor).detach().numpy()  # llama.cpp's norms
        if leave_out in called:
            continue
        if quantized and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(called, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(called, values)
