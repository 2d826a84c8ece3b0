"""Tiny random models of many architectures, and whether each works exactly as a policy and as an expert.

`python -m tests.architectures` writes what it finds on transformers into docs/engines.md, with `--vllm` what it finds
on vLLM's build for CPUs; tests keep page and measurement equal.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from experts.architectures import check_policy
from experts.config import ExpertConfig
from experts.encoder import TransformersEncoder
from experts.loading import FrozenModel, ModelError, load_frozen
from learner.logprobs import completion_logprobs
from rollout.continuous import ContinuousBatch, Decoding
from rollout.draws import token_uniforms
from rollout.engine import Request, TransformersEngine
from rollout.sequence import PrefixPosition, lay_out_completions, lay_out_prompts
from rollout.types import Sampling
from tests.models import tokenizer

VALUES, GRADIENTS = 1e-5, 1e-4
WINDOW, SLOTS, SAMPLES, LIMIT = 8, 3, 3, 6
PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
START, END = "<!-- made by tests/architectures.py -->", "<!-- end -->"
# In a batch with others, shorter and longer than the window; one gate is closed.
PROMPTS = (
    [5, 9, 4],
    [7, 3, 8, 6, 2, 11, 13, 12, 30, 31, 32, 20, 21, 44],
    [4, 4, 17, 5, 9, 40],
    [6, 50, 51, 9, 8, 7, 60],
)
OPEN = (True, True, False, True)
HEAD = "| architecture | policy, transformers | expert, transformers | policy, vLLM | expert, vLLM |"
Prompts = Sequence[Sequence[int]]

SHARED = {
    "vocab_size": len(tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 3,
    "eos_token_id": 1,
}
HALF = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
MAMBA = {
    "num_hidden_layers": 3,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
DELTA = {  # a recurrent layer that reads the prefix, and one that reads what attention makes of it
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CONVOLUTION = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PER_LAYER = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": len(tokenizer()),
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GLOBAL = {"global_head_dim": 8}

RECURRENT = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"))

# What a row is called: its model type, and what it has that SHARED does not say.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", MOE),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", HALF | {"use_sliding_window": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_next": ("qwen3_next", DELTA | MOE | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", DELTA | MOE | {"shared_expert_intermediate_size": 16}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", HALF | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", HALF),
    "gemma3n": ("gemma3n_text", HALF | PER_LAYER | {"laurel_rank": 4}),
    "gemma4": ("gemma4_text", HALF | GLOBAL | {"hidden_size_per_layer_input": 0}),
    "gemma4, per-layer embeddings": ("gemma4_text", HALF | GLOBAL | PER_LAYER),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "gpt_oss": ("gpt_oss", HALF | MOE),
    "cohere2": ("cohere2", HALF),
    "granite": ("granite", {"embedding_multiplier": 12.0, "logits_scaling": 8.0}),
    "granitemoehybrid": (
        "granitemoehybrid",
        MAMBA | MOE | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 32},
    ),
    "falcon_h1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 64}),
    "bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "nemotron_h": (
        "nemotron_h",
        {
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "chunk_size": 8,
            "n_groups": 1,
            "hybrid_override_pattern": "M*M-",
        },
    ),
    "jamba": (
        "jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "olmo_hybrid": ("olmo_hybrid", DELTA),
    "lfm2": ("lfm2", CONVOLUTION | {"block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("lfm2_moe", MOE | CONVOLUTION | {"num_dense_layers": 1}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", HALF),
    "smollm3": ("smollm3", {}),
    "gpt2": ("gpt2", {}),
    "gptj": ("gptj", {"rotary_dim": 8}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt, narrow embeddings": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mpt": ("mpt", {"max_seq_len": 256}),
    "bloom": ("bloom", {}),
    "falcon": ("falcon", {"head_dim": None}),
    "falcon, ALiBi": ("falcon", {"head_dim": None, "alibi": True}),
    "llama4": (
        "llama4_text",
        MOE
        | {
            "attention_chunk_size": WINDOW,
            "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "mamba": ("mamba", RECURRENT | {"state_size": 8}),
    "mamba2": (
        "mamba2",
        RECURRENT | {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
    "rwkv": ("rwkv", RECURRENT | {"attention_hidden_size": 32}),
    "recurrent_gemma": ("recurrent_gemma", {"attention_window_size": WINDOW, "lru_width": 32, "num_hidden_layers": 3}),
}


# Heads of 32, the smallest that vLLM's attention on CPUs takes.
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "global_head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_ssm": 256,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "lru_width": 128,
    "attention_hidden_size": 128,
}
OF_VLLM: dict[str, dict[str, Any]] = {
    "gpt_neox": {"num_key_value_heads": None},  # transformers has no use for them, vLLM would believe them
    "lfm2": {"conv_dim": 128, "block_dim": 128},  # which published models say, and transformers does not
    "llama4": {"attention_chunk_size": 128, "num_experts_per_tok": 1},  # whole blocks of its cache, as published ones
    "opt": {"word_embed_proj_dim": 128},
    "opt, narrow embeddings": {"word_embed_proj_dim": 64},
}


def configuration(name: str, engine: str = "transformers") -> Any:
    """The architecture's, tiny, as a saved model has it."""
    kind, own = ARCHITECTURES[name]
    settings = SHARED | own
    if engine == "vllm":
        settings |= {key: value for key, value in WIDE.items() if settings.get(key)} | OF_VLLM.get(name, {})
    settings = {key: value for key, value in settings.items() if value is not None}
    config = AutoConfig.for_model(kind, **settings)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    return config


def make(name: str, folder: Path, engine: str = "transformers") -> str:
    """Saves the architecture's model and a tokenizer; returns the path."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name, engine))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # large enough that everything matters, biases and gains too
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def policy_verdict(path: str, position: PrefixPosition, prompts: Prompts = PROMPTS) -> str:
    """`exact`, or why the model is refused as a policy.

    Raises:
        AssertionError: when it is neither.
    """
    try:
        check_policy(path)
    except ModelError as error:
        return f"refused: {str(error).split('policy: ')[1].split(';')[0]}"
    policy = replace(load_frozen(path), end_tokens=tuple(range(0, SHARED["vocab_size"], 6)))
    plain = load_reference(path)
    prefix = 0.5 * torch.randn(len(prompts), SLOTS, policy.width, generator=torch.Generator().manual_seed(2))
    requests = [
        Request(tokens, token_uniforms(3, ordinal, 0, SAMPLES, LIMIT), open=shown)
        for ordinal, (tokens, shown) in enumerate(zip(prompts, OPEN, strict=True))
    ]
    said = {}
    for temperature in (0.0, 0.7):
        sampling = Sampling(temperature=temperature, max_new_tokens=LIMIT, samples=SAMPLES)
        made = TransformersEngine(policy, position).generate(requests, prefix, sampling)
        said[temperature] = [[(c.tokens.tolist(), c.logprobs) for c in group] for group in made]
    said[0.0] += [[answer] for answer in served(policy, position, prefix, prompts)]
    for row, prompt in enumerate(prompts):
        own = prefix[row] if OPEN[row] else prefix[row, :0]
        for temperature, groups in said.items():
            answers = groups[row] + (groups[len(prompts) + row] if temperature == 0 else [])
            for tokens, found in answers:
                wanted = naive(plain, position, prompt, own, tokens, temperature)
                close(torch.as_tensor(np.array(found)), wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0])
                if temperature == 0:
                    assert tokens == wanted.argmax(dim=1).tolist()
    for longest in (LIMIT, 2):  # with 2, a single token is read behind the prompt
        learned(
            policy, plain, position, prefix, prompts, [[tokens[:longest] for tokens, _ in group] for group in said[0.7]]
        )
    return "exact"


def served(
    policy: FrozenModel, position: PrefixPosition, prefix: Tensor, prompts: Prompts
) -> list[tuple[list[int], list[float]]]:
    """The server's greedy answers of several lengths; with room for two at a time they come, go and move."""

    async def listen(batch: ContinuousBatch, row: int) -> tuple[list[int], list[float]]:
        decoding, slots = Decoding(temperature=0.0, max_new_tokens=2 + row), prefix[row] if OPEN[row] else None
        pieces = [piece async for piece in batch.stream(prompts[row], slots, decoding)]
        return [token for piece in pieces for token in piece.tokens], [p for piece in pieces for p in piece.logprobs]

    async def everyone(batch: ContinuousBatch) -> list[tuple[list[int], list[float]]]:
        return await asyncio.gather(*(listen(batch, row) for row in range(len(prompts))))

    with closing(ContinuousBatch(replace(policy, end_tokens=()), position, limit=2)) as batch:
        return asyncio.run(everyone(batch))


def learned(
    policy: FrozenModel,
    plain: FrozenModel,
    position: PrefixPosition,
    prefix: Tensor,
    prompts: Prompts,
    completions: list[list[list[int]]],
) -> None:
    """The learner's values, and the gradient of a random sum of them, against each completion alone."""
    prefix = prefix.clone().requires_grad_(True)
    shown = torch.tensor(OPEN)[:, None].expand(-1, SLOTS)
    laid = lay_out_prompts(prompts, SLOTS, policy.pad_id, position, shown)
    behind = lay_out_completions(laid, completions, policy.pad_id)
    found = completion_logprobs(policy, laid, prefix, behind, 0.7).logprobs
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad((found * weights)[behind.valid].sum(), prefix)
    total = torch.zeros(())
    for row, tokens in enumerate(tokens for group in completions for tokens in group):
        of = row // SAMPLES
        own = prefix[of] if OPEN[of] else prefix[of, :0]
        alone = naive(plain, position, prompts[of], own, tokens, 0.7)
        alone = alone.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        close(found[row, : len(tokens)], alone)
        total = total + (alone * weights[row, : len(tokens)]).sum()
    (wanted,) = torch.autograd.grad(total, prefix)
    assert wanted.norm() > 1e-2
    for row, shows in enumerate(OPEN):
        assert shows or not gradient[row].any()
        # Behind a long prompt a window or a decaying state leaves next to nothing of a row's own.
        error = (gradient[row] - wanted[row]).norm() / wanted[row].norm().clamp_min(1e-3 * wanted.norm())
        assert error < GRADIENTS, f"d loss / d prefix is off by {error:.1e} of its size"


def load_reference(path: str) -> FrozenModel:
    """With the attention that the architecture's own module writes out: others leave parts of it out."""
    loaded = load_frozen(path)
    loaded.model.set_attn_implementation("eager")
    return loaded


def naive(
    policy: FrozenModel, position: PrefixPosition, prompt: Sequence[int], own: Tensor, said: Sequence[int], heat: float
) -> Tensor:
    """(tokens, vocabulary) log-probabilities of an answer's tokens: one row alone, no padding, no cache; where there is
    no prefix, from its ids."""
    head = 1 if position == "after_bos" else 0
    ids = [*prompt[:head], *([policy.pad_id] * len(own)), *prompt[head:], *said]
    embedded = policy.embed(torch.tensor(ids))
    whole = torch.cat([embedded[:head], own, embedded[head + len(own) :]])
    row = torch.tensor([ids])
    given = policy.inputs(row, whole[None]) if len(own) else {"input_ids": row}
    logits = policy.model(**given, use_cache=False).logits[0]
    return (logits[len(ids) - len(said) - 1 : -1] / (heat or 1.0)).log_softmax(dim=-1)


def close(found: Tensor, wanted: Tensor) -> None:
    """Both within VALUES."""
    error = (found - wanted).abs().max().item()
    assert error < VALUES, f"off by {error:.1e}"


def expert_verdict(path: str) -> str:
    """`exact`, where states and answers do not depend on what else is in the batch.

    Raises:
        AssertionError: when they do.
    """
    encoder = TransformersEncoder(ExpertConfig(name="one", model=path, pool="last_k", last_k=3), path)
    plain = load_reference(path)
    together = encoder.states(PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = encoder.states([prompt])
        states = plain.body(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state
        close(torch.from_numpy(found), torch.from_numpy(alone))
        close(torch.from_numpy(found), states[0, -3:].detach())
    for together, prompt in zip(encoder.answer(PROMPTS, LIMIT), PROMPTS, strict=True):
        (alone,) = encoder.answer([prompt], LIMIT)
        assert together[: len(alone)] == alone and set(together[len(alone) :]) <= {encoder.frozen.pad_id}
    return "exact"


def verdicts(name: str, folder: Path) -> list[str]:
    """What the page says of an architecture: as a policy, and as an expert."""
    path = make(name, folder)
    (policy,) = {policy_verdict(path, position) for position in ("front", "after_bos")}
    return [policy, expert_verdict(path)]


def documented() -> dict[str, list[str]]:
    """The page's rows: on transformers as the policy and as an expert, and the same on vLLM."""
    section = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name.strip("`"): verdict for name, *verdict in rows[2:]}


def on_transformers() -> dict[str, list[str]]:
    """Every architecture's verdicts."""
    found = {}
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = verdicts(name, Path(folder))
    return found


def on_vllm(names: Sequence[str] = ()) -> dict[str, list[str]]:
    """Verdicts of these, or of all; measured in another process, whose engines start in seconds."""
    command = [sys.executable, "-m", "tests.vllm.architectures", *names]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=7200).stdout
    return dict(json.loads(line) for line in printed.splitlines() if line.startswith('["'))


def write(vllm: bool) -> None:
    """Puts the columns of one engine into the page's table."""
    found, known = on_vllm() if vllm else on_transformers(), documented()
    lines = ["", HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for name in ARCHITECTURES:
        row = known.get(name, ["not measured"] * 4)
        row[slice(2, 4) if vllm else slice(0, 2)] = found[name]
        lines.append(f"| `{name}` | " + " | ".join(row) + " |")
    before, behind = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + "\n".join(lines) + "\n" + END + behind.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write("--vllm" in sys.argv)
