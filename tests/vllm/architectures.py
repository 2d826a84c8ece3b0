"""Whether vLLM's build for CPUs gives an architecture's numbers, as the policy and as an expert.

`python -m tests.architectures --vllm` measures all of them, an hour on two cores, and writes the page's columns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.config import ExpertConfig
from experts.encoder import VllmEncoder
from experts.loading import FrozenModel, load_embeddings, load_frozen
from rollout.config import PolicyConfig
from rollout.engine import Request
from rollout.sequence import PrefixPosition
from rollout.types import Sampling
from rollout.vllm import VllmPolicyEngine
from tests.architectures import LIMIT, PROMPTS, SAMPLES, SHARED, SLOTS, make, naive

TOLERANCE = 1e-4
ENGINE = {"engine": "vllm", "max_model_tokens": 256, "kv_cache_gb": 0.125}
# Longer than a block of its cache, which holds 128 tokens on CPUs; asked twice, so that a block is found there.
LONG = tuple(np.random.default_rng(0).integers(3, SHARED["vocab_size"], size=size).tolist() for size in (130, 200))
EVERY = (*PROMPTS, *LONG)
OPEN = (True, True, False, True, True, False)
K = 3


def policy_errors(frozen: FrozenModel, engine: VllmPolicyEngine, position: PrefixPosition) -> dict[str, float]:
    """Largest errors of log-probabilities (nats) in one mixed batch, against a full forward of each row alone."""
    engine.position = position
    prefix = 0.5 * torch.randn(len(EVERY), SLOTS, frozen.width, generator=torch.Generator().manual_seed(2))
    rows = zip(EVERY, OPEN, strict=True)
    requests = [Request(np.array(tokens), None, 7 + row, open=shown) for row, (tokens, shown) in enumerate(rows)]
    errors: dict[str, float] = {}
    for ask, temperature in (("greedy", 0.0), ("again", 0.0), ("sampled", 0.7)):
        sampling = Sampling(temperature=temperature, max_new_tokens=LIMIT, samples=SAMPLES if temperature else 1)
        groups = engine.generate(requests, prefix, sampling)
        worst = 0.0
        for row, group in enumerate(groups):
            own = prefix[row] if OPEN[row] else prefix[row, :0]
            for made in group:
                tokens = torch.from_numpy(made.tokens)
                wanted = naive(frozen, position, EVERY[row], own, made.tokens.tolist(), temperature)
                chosen = wanted.gather(1, tokens[:, None])[:, 0]
                worst = max(worst, difference(torch.from_numpy(made.logprobs), chosen))
                if not temperature:
                    worst = max(worst, difference(chosen, wanted.max(dim=1).values))
        errors[f"{position} {ask}"] = worst
    return errors


def expert_errors(frozen: FrozenModel, encoder: VllmEncoder) -> dict[str, float]:
    errors = {}
    for ask in ("states", "again"):
        worst = 0.0
        for prompt, found in zip(EVERY, encoder.states(EVERY), strict=True):
            with torch.no_grad():
                wanted = frozen.body(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -K:]
            worst = max(worst, difference(torch.from_numpy(found), wanted))
        errors[ask] = worst
    return errors


def answer_errors(frozen: FrozenModel, answers: list[list[int]]) -> dict[str, float]:
    worst = 0.0
    for prompt, tokens in zip(EVERY, answers, strict=True):
        with torch.no_grad():
            logits = frozen.model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0]
        wanted = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        chosen = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, difference(chosen, wanted.max(dim=1).values))
    return {"answers": worst}


def difference(found: Tensor, wanted: Tensor) -> float:
    return (found - wanted).abs().max().item()
