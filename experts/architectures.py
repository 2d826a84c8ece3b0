"""Which architectures an engine runs exactly: what their configuration says, before any weight is loaded."""

from __future__ import annotations

import inspect
from typing import Any

from experts.bidirectional import is_encoder
from experts.kv_cache import is_recurrent, new_cache
from experts.loading import ModelError, reads_ids

# Models whose forward takes a cache and keeps a part of what it has read elsewhere.
OWN_STATE = {
    "minimax": "it takes a cache of its own only",
    "recurrent_gemma": "its recurrent blocks keep their state in themselves, not in past_key_values",
}
# Models with recurrent layers that tests have seen go on from a cached prompt exactly, with gradient.  Others may not:
# Jamba's layers forget their state when several tokens are read at once.
EXACT_HYBRIDS = (
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "lfm2",
    "lfm2_moe",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)


# What was seen of vLLM 0.32, by model type (`python -m tests.architectures --vllm`); see docs/engines.md.
WRONG_ON_VLLM = {
    "bloom": "vLLM computes its GELU exactly, transformers by its tanh approximation",
    "cohere2": "vLLM's windows are a token longer than those of transformers",
    "nemotron_h": "vLLM has no lower limit (time_step_min) for its time steps, transformers has",
    "gemma3n_text": "vLLM leaves out what its layers read of token ids",
}
NOT_ON_CPUS = {
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
        "vLLM's build for CPUs computes its linear attention in bfloat16 only",
    ),
    **dict.fromkeys(("falcon_mamba", "jamba", "mamba"), "vLLM's build for CPUs has no kernel for its selective scan"),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "vLLM's build for CPUs rotates its queries and keys wrongly"),
    "olmo_hybrid": "its linear attention needs Triton, which vLLM's build for CPUs comes without",
}


def check_policy(path: str, engine: str = "transformers", on_gpus: bool = False) -> None:
    """Loads no weights, to refuse a model that would read a prefix wrongly before anything expensive starts.

    Raises:
        ModelError: naming the architecture and the reason.
    """
    config = _config(path)
    if reason := policy_refusal(config):
        raise ModelError(f"model {path!r}: {config.model_type} cannot be the policy: {reason}; as an expert it works")
    _refuse(path, "the policy", config, policy_refusal(config, engine, on_gpus))


def check_expert(path: str, engine: str = "transformers", on_gpus: bool = False) -> None:
    """Loads no weights, to refuse a model whose states or answers would be wrong before anything expensive starts.

    Raises:
        ModelError: naming the architecture and the reason.
    """
    config = _config(path)
    _refuse(path, "an expert", config, expert_refusal(config, engine, on_gpus))


def policy_refusal(config: Any, engine: str = "transformers", on_gpus: bool = False) -> str | None:
    """Why models of this configuration cannot read a prefix and go on from what they have read; None where they can."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if is_encoder(config):
        return "it is an encoder, which reads and cannot write"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    arguments = inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].forward).parameters
    if "inputs_embeds" not in arguments:
        return "it reads token ids only, and a prefix has none"
    if "past_key_values" not in arguments:
        own = [name for name in ("cache_params", "state") if name in arguments]
        return f"it keeps what it has read in {own[0] if own else 'itself'}, not in past_key_values"
    if config.model_type in OWN_STATE:
        return OWN_STATE[config.model_type]
    try:
        cache = new_cache(config)
    except ModelError as error:
        return str(error)
    if any(map(is_recurrent, cache.layers)) and config.get_text_config().model_type not in EXACT_HYBRIDS:
        return "its recurrent layers are not known to go on exactly from a cached prompt"
    if engine == "transformers":
        return None
    if reads_ids(config):
        return "its layers read embeddings of token ids, which vLLM does not take beside a prefix"
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        return "its embeddings are narrower than its states, and vLLM takes prompts as wide as these"
    return expert_refusal(config, engine, on_gpus)


def expert_refusal(config: Any, engine: str = "transformers", on_gpus: bool = False) -> str | None:
    """Why models of this configuration give other states or answers on this engine; None where none is known."""
    if engine == "transformers":
        return None
    text = config.get_text_config()
    kind = text.model_type
    if kind in ("qwen2", "qwen3") and len(set(text.layer_types)) > 1:
        return "vLLM has no windows in some of its layers only"
    if kind in WRONG_ON_VLLM:
        return WRONG_ON_VLLM[kind]
    if kind in NOT_ON_CPUS and not on_gpus:
        return f"{NOT_ON_CPUS[kind]}; on GPUs it was not tried"
    return None


def _config(path: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path)


def _refuse(path: str, role: str, config: Any, reason: str | None) -> None:
    if reason:
        raise ModelError(
            f"model {path!r}: {config.model_type} cannot be {role} on vLLM: {reason}; take engine: transformers"
        )
