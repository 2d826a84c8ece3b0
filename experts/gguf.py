"""GGUF files made into ordinary Hugging Face folders: the only module that reads them.

transformers does the reading.  What it leaves undone is done here: its tokenizer lacks the rule that puts a BOS token
in front of a text, without which some models (Gemma) talk nonsense.
"""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experts.loading import ModelError, import_transformers

# Vocabularies in front of whose texts llama.cpp puts a BOS token where a file does not say.
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
UNREADABLE = (ValueError, TypeError, KeyError, IndexError, OverflowError, NotImplementedError, struct.error)


def convert(file: Path, folder: Path) -> None:
    """Writes a GGUF file's model, in float32, and its tokenizer into an empty folder.

    float32 holds every quantised weight exactly: what is loaded from the folder, in whatever dtype, equals what
    transformers reads from the file in that dtype.

    Raises:
        ModelError: when the file is no GGUF, damaged, of an architecture that transformers does not read, or there is
            no room for the folder.
    """
    metadata = read_metadata(file)
    model = _read_model(file, metadata)
    _check_room(folder, model)
    tokenizer = _read_tokenizer(file, metadata)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_file(file: Path) -> None:
    """Looks at a file's first bytes.

    Raises:
        ModelError: when there is no such file, or it is no GGUF.
    """
    if not file.is_file():
        raise ModelError(f"model {str(file)!r}: there is no such file")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ModelError(f"model {str(file)!r} is not a GGUF file: give one, or a Hugging Face folder or name")


def read_metadata(file: Path) -> dict[str, Any]:
    """A file's metadata; of vocabularies only the sizes.

    Raises:
        ModelError: when it is no GGUF file, or one of several pieces, or the package that reads it is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model {str(file)!r}: reading GGUF files needs the package gguf: pip install gguf")
    check_file(file)
    from transformers.integrations.gguf import read_gguf_metadata

    try:
        metadata: dict[str, Any] = read_gguf_metadata(str(file))[0]
    except UNREADABLE as error:
        raise _unreadable(file, error) from error
    if metadata.get("split.count", 1) > 1:
        raise ModelError(f"model {str(file)!r} is one of several pieces: join them with llama-gguf-split --merge")
    return metadata


def _read_model(file: Path, metadata: Mapping[str, Any]) -> Any:
    """The model in float32."""
    transformers = import_transformers()
    # Without it weights may stay packed, where kernels for them are installed, and a model that was dequantised keeps
    # a record of its quantisation and cannot be saved.
    quantization = transformers.GgufConfig(dequantize=True)
    how = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": quantization}
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(file.parent, output_loading_info=True, **how)
    except (*UNREADABLE, OSError, RuntimeError) as error:
        if "not supported" in str(error) or isinstance(error, NotImplementedError):
            architecture = metadata["general.architecture"]
            raise ModelError(
                f"model {str(file)!r}: transformers does not read the architecture {architecture!r} from GGUF files "
                f"({_first_line(error)}): take the model's Hugging Face folder"
            ) from error
        raise _unreadable(file, error) from error
    if absent := {str(key) for key in (*found["missing_keys"], *found["mismatched_keys"])}:
        raise ModelError(
            f"model {str(file)!r}: transformers finds no {min(absent)} in it ({len(absent)} weights are missing): take "
            "the model's Hugging Face folder"
        )
    return model


def _read_tokenizer(file: Path, metadata: Mapping[str, Any]) -> Any:
    """The file's tokenizer, which begins and ends a text as the file says."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (*UNREADABLE, OSError, RuntimeError) as error:
        raise _unreadable(file, error) from error
    begin = [tokenizer.bos_token] if _adds_bos(metadata) and tokenizer.bos_token else []
    end = [tokenizer.eos_token] if metadata.get("tokenizer.ggml.add_eos_token") and tokenizer.eos_token else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{token}:1" for token in begin), "$B:1", *(f"{token}:1" for token in end)],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in {*begin, *end}],
    )
    return _plain(tokenizer)


def _plain(tokenizer: Any) -> Any:
    """The same tokenizer as a class that takes its parts from its own file: others make theirs anew when loaded."""
    from transformers import PreTrainedTokenizerFast

    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special)
    made.chat_template = tokenizer.chat_template
    return made


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """What the file says, or else what llama.cpp does with vocabularies of its kind."""
    of_kind = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT
    return bool(metadata.get("tokenizer.ggml.add_bos_token", of_kind))


def _check_room(folder: Path, model: Any) -> None:
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the model as a folder takes {needed / 1e9:.1f}: make "
            "room there, or set MUSKETEERS_MODELS to a folder that has it"
        )


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(
        f"model {str(file)!r} cannot be read ({type(error).__name__}: {_first_line(error)}): is it whole? Compare its "
        "size and hash with those of the place that it came from"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
