"""Loading frozen models: the only module that reads models and tokenizers from disk or the hub."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from experts.adapter import MARK, Adapter, LoraConfig
from experts.bidirectional import encoder_arguments, is_encoder
from experts.chat import Chat, ChatSettings, Messages, canonical


class ModelError(ValueError):
    """A model that cannot be used as asked; the message names it and what to do."""


UNTRAINED_SEED = 65537


@dataclass(frozen=True)
class FrozenModel:
    """A language model none of whose parameters can ever have a gradient.

    path: where it came from: a folder, or a name of the hub.
    end_tokens: none in an encoder, which reads and cannot answer.
    chat_settings: of what it is shown; those that change its prompts for good are part of what it is.
    """

    path: str
    name: str
    model: Any  # PreTrainedModel; transformers is imported late because it costs seconds
    tokenizer: Any
    end_tokens: tuple[int, ...]
    pad_id: int
    adapter: Adapter | None = None
    chat_settings: ChatSettings = field(default_factory=ChatSettings)

    @functools.cached_property
    def chat(self) -> Chat:
        """How conversations become its tokens."""
        return Chat(self.tokenizer, self.chat_settings, closed=self.is_encoder)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.device

    @property
    def width(self) -> int:
        """Width of the token embeddings, and so of a prefix; hidden states are wider in a few models (OPT-350m)."""
        return self.embed(torch.zeros(1, dtype=torch.long, device=self.device)).shape[-1]

    @property
    def body(self) -> Any:
        """The model without its output layer."""
        body = self.model.base_model
        if body is not self.model or self.is_encoder:
            return body
        return self.model.model  # Llama 4 names it wrongly

    @property
    def is_encoder(self) -> bool:
        """See `bidirectional.is_encoder`."""
        return is_encoder(self.model.config)

    @property
    def parameters(self) -> int:
        """Number of distinct parameters."""
        if isinstance(self.model, EmbeddingsOnly):
            return self.model.parameters_of_all
        return sum(p.numel() for name, p in self.model.named_parameters() if MARK not in name)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token embeddings, (..., width), detached."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(tokens)

    def inputs(self, tokens: torch.Tensor, embedded: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a forward pass takes for embedded tokens.

        tokens: (batch, length) their ids, and the pad id where a vector is no token's; models that read an embedding
            of the id in every layer get those too.
        """
        if not reads_ids(self.model.config):
            return {"inputs_embeds": embedded}
        look_up = self.body.get_per_layer_inputs
        ids = (tokens, None) if len(inspect.signature(look_up).parameters) == 2 else (tokens,)
        return {"inputs_embeds": embedded, "per_layer_inputs": look_up(*ids)}

    def tokenize(self, messages: Messages) -> list[int]:
        """See `Chat.tokenize`."""
        return self.chat.tokenize(messages)

    def fingerprint(self) -> str:
        """Hash of stored weights, tokenizer, chat template and its variables: what a model is, however it runs.

        The date is not part of it: on another day it is the same model.
        """
        digest = hashlib.sha256(stored_sha256(self.path).encode())
        digest.update(tokenizer_text(self.tokenizer).encode())
        digest.update(str(getattr(self.tokenizer, "chat_template", None)).encode())
        digest.update(canonical(self.chat_settings.variables).encode())
        return digest.hexdigest()


class EmbeddingsOnly(nn.Module):
    """The input embeddings of a model whose weights an engine of its own holds; it computes nothing else.

    parameters_of_all: of the whole model, not of this part.
    """

    def __init__(self, config: Any, embedding: nn.Module, parameters_of_all: int) -> None:
        super().__init__()
        self.config, self.embedding, self.parameters_of_all = config, embedding, parameters_of_all

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return next(self.embedding.parameters()).device

    def get_input_embeddings(self) -> nn.Module:
        """As a transformers model."""
        return self.embedding


def reads_ids(config: Any) -> bool:
    """Whether a model's layers read embeddings of the token ids beside the hidden states (Gemma 3n, Gemma 4 E2B)."""
    return bool(getattr(config.get_text_config(), "hidden_size_per_layer_input", None))


def tokenizer_text(tokenizer: Any) -> str:
    """A canonical text of a tokenizer, for hashing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))


def weights_sha256(model: nn.Module) -> str:
    """Hash over every parameter's and buffer's name, shape, dtype and bytes, in name order; adapters are left out."""
    digest = hashlib.sha256()
    own = {n.replace(".base_layer.", "."): tensor for n, tensor in model.state_dict().items() if MARK not in n}
    for name, tensor in sorted(own.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stored_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a model's weight files, by name, in the files' own dtypes."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        for file in sorted(folder.glob("*.bin")):
            yield from torch.load(file, map_location="cpu", mmap=True, weights_only=True).items()
        return
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                yield name, tensors.get_tensor(name)


@functools.lru_cache(maxsize=8)
def stored_sha256(path: str) -> str:
    """Hash over every stored tensor's name, shape, dtype and bytes, however they are cut into files."""
    digests = {}
    for name, tensor in stored_tensors(path):
        digest = hashlib.sha256(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def describe(path: str) -> dict[str, Any]:
    """The model's `config.json` values the plan needs, read without loading weights.

    Returns a dict with `architecture`, `hidden_size`, `embedding_size` (of a token, and so of a prefix), `layers`,
    `vocabulary`, `heads`, `kv_heads` and `head_size` (0 without attention), `longest` (positions, or None),
    `feedforward`, `quantized` (by what method, or None), `tied` (embeddings), `encoder` (reads and cannot answer) and
    `stored_bytes` of its weights (0 when they are not here).

    Raises:
        ModelError: when there is no such model, or its folder is incomplete.
    """
    from transformers import AutoConfig

    folder = Path(path).expanduser()
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or folder.is_dir()
    if looks_local:
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model {path!r}: there is no {folder / 'config.json'}: give a Hugging Face folder or name"
            )
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ModelError(f"model {path!r}: {folder} holds no weights (*.safetensors): copy the whole folder again")
        if not any(folder.glob("tokenizer*")):
            raise ModelError(f"model {path!r}: {folder} holds no tokenizer: copy the whole folder again")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"model {path!r} cannot be found or read: {_first_line(error)}") from error
    if not hasattr(config, "hidden_size"):
        raise ModelError(
            f"model {path!r}: a {type(config).__name__} has no hidden_size of its own, as models of more than text do "
            "not: take a text-only sibling"
        )
    quantization = getattr(config, "quantization_config", None)
    heads = getattr(config, "num_attention_heads", None) or 0
    return {
        "architecture": (config.architectures or [type(config).__name__])[0],
        "hidden_size": config.hidden_size,
        "embedding_size": getattr(config, "word_embed_proj_dim", None) or config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_size": (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0,
        "longest": getattr(config, "max_position_embeddings", None),
        "feedforward": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "stored_bytes": _stored_bytes(folder),
        "quantized": None if quantization is None else quantization.get("quant_method", "by an unknown method"),
        "tied": bool(getattr(config, "tie_word_embeddings", False)),
        "encoder": is_encoder(config),
    }


def _stored_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


def end_tokens(tokenizer: Any, name: str, generation_config: Any = None) -> tuple[int, ...]:
    """Ids that end an answer.

    Raises:
        ModelError: when the model has none; an answer could then never end.
    """
    found = getattr(generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(found if isinstance(found, list) else [found])} - {None}
    if not ids:
        raise ModelError(f"model {name!r}: its tokenizer has no end token: set eos_token in its tokenizer_config.json")
    return tuple(sorted(ids))


def check_end_token(path: str) -> None:
    """Loads no weights, to refuse a model without an end token before anything expensive starts; encoders need none.

    Raises:
        ModelError: when there is none, or the tokenizer cannot be read.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(path)
    if not is_encoder(AutoConfig.from_pretrained(path)):
        end_tokens(tokenizer, path, _generation_config(path))


def load_tokenizer(path: str) -> Any:
    """A model's tokenizer alone, which decodes what it is given and cleans nothing up.

    Raises:
        ModelError: when it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises nothing more special, and a file may lack any key
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ModelError(f"model {path!r}: its tokenizer cannot be read: {reason}") from error
    _decode_as_it_is(tokenizer)
    return tokenizer


def _decode_as_it_is(tokenizer: Any) -> None:
    """Switches off what would take spaces out of an answer, such as that in `a , b`."""
    tokenizer.clean_up_tokenization_spaces = False
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is not None and hasattr(decoder, "cleanup"):  # of word pieces
        decoder.cleanup = False


def import_transformers() -> Any:
    """transformers with everything that loading a model needs; the first call in a process takes seconds."""
    import transformers.utils

    # A quarter of its import is scikit-learn, for a kind of assisted generation that nothing here uses.
    transformers.utils.is_sklearn_available = lambda: False
    import transformers.generation
    import transformers.modeling_utils

    return transformers


def load_frozen(
    path: str,
    dtype: str = "float32",
    device: str = "cpu",
    name: str | None = None,
    untrained: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> FrozenModel:
    """Loads a causal language model, or the body of an encoder, and freezes it.

    untrained: with the weights that its architecture starts from, always the same, instead of those that are stored.
    lora: an adapter to be put in, which is all of it that can train; seed: of its start.

    Raises:
        ModelError: when it cannot be found or read, needs a package that is not here, or has no end token.
    """
    transformers = import_transformers()
    tokenizer = load_tokenizer(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = transformers.AutoModel if is_encoder(config) else transformers.AutoModelForCausalLM
        arguments = _arguments(config)
        if untrained:
            model = _untrained(kind, config, arguments, getattr(torch, dtype))
        else:
            model, found = kind.from_pretrained(
                path, dtype=getattr(torch, dtype), output_loading_info=True, **arguments
            )
            if found["missing_keys"]:  # transformers would draw them at random
                raise ValueError(f"its files hold no {min(found['missing_keys'])}")
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"model {path!r} cannot be loaded: {_first_line(error)}") from error
    return _frozen(path, name, model.to(device), tokenizer, getattr(model, "generation_config", None), lora, seed)


def _untrained(kind: Any, config: Any, arguments: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A fresh model of the architecture that is stored; the same one whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNTRAINED_SEED)
        return kind.from_config(config, **arguments).to(dtype)


def _arguments(config: Any) -> dict[str, Any]:
    """What a model of this configuration is made with beside its weights.

    transformers' own choice of attention leaves out the cap on Gemma 2's scores.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return encoder_arguments(config) | ({"attn_implementation": "eager"} if capped else {})


def load_embeddings(
    path: str, dtype: str = "float32", name: str | None = None, lora: LoraConfig | None = None
) -> FrozenModel:
    """A model's tokenizer and input embeddings alone: its weights are in an engine of their own.

    lora: the adapter then has names and shapes only, for a router's snapshots.

    Raises:
        ModelError: when it cannot be found or read, or has no end token.
    """
    transformers = import_transformers()
    from accelerate import init_empty_weights

    tokenizer = load_tokenizer(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with init_empty_weights():
            whole = transformers.AutoModelForCausalLM.from_config(config)
        whole.tie_weights()
        count = sum(parameter.numel() for parameter in whole.parameters())
        embedding = whole.get_input_embeddings()
        wanted = next(key for key, value in whole.named_parameters() if value is embedding.weight)
        tensor = _stored(path, wanted, tuple(embedding.weight.shape))
        generation = _generation_config(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {path!r} cannot be loaded: {_first_line(error)}") from error
    embedding.weight = nn.Parameter(tensor.to(getattr(torch, dtype)), requires_grad=False)
    adapter = None if lora is None else Adapter(whole, lora, 0)
    return replace(
        _frozen(path, name, EmbeddingsOnly(config, embedding, count), tokenizer, generation), adapter=adapter
    )


def _stored(path: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of the weight files, by its name or by the end of it: files may lack or rename the outermost module."""
    inner = name.partition(".")[2]
    for stored, tensor in stored_tensors(path):
        if (name.endswith(stored) or stored.endswith((name, f".{inner}"))) and tuple(tensor.shape) == shape:
            return tensor
    raise ModelError(f"its files hold no {name} of shape {shape}: take engine: transformers for it")


def _generation_config(path: str) -> Any:
    """As a loaded model has it: where there is no such file, from its `config.json`."""
    from transformers import AutoConfig, GenerationConfig
    from transformers.utils import cached_file

    if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False) is None:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(path))
    return GenerationConfig.from_pretrained(path)


def _frozen(
    path: str,
    name: str | None,
    model: Any,
    tokenizer: Any,
    generation_config: Any,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> FrozenModel:
    model.requires_grad_(False)
    model.eval()
    ends = () if is_encoder(model.config) else end_tokens(tokenizer, path, generation_config)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    adapter = None if lora is None else Adapter(model, lora, seed)
    model.eval()
    return FrozenModel(path, name or path, model, tokenizer, ends, pad_id, adapter)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
