"""Whether vLLM's build for CPUs gives an architecture's numbers, as the policy and as an expert.

`python -m tests.vllm.architectures [NAME ...]` prints a line of JSON for each; `python -m tests.architectures --vllm`
measures all of them and writes the page's columns.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.architectures import expert_refusal, policy_refusal
from experts.config import ExpertConfig
from experts.encoder import VllmEncoder
from experts.loading import FrozenModel, ModelError, load_embeddings
from experts.vllm_engine import EngineDiedError
from experts.vllm_install import supports
from rollout.config import PolicyConfig
from rollout.engine import Request
from rollout.sequence import PrefixPosition
from rollout.types import Sampling
from rollout.vllm import VllmPolicyEngine
from tests.architectures import (
    ARCHITECTURES,
    LIMIT,
    OPEN,
    PROMPTS,
    SAMPLES,
    SHARED,
    SLOTS,
    configuration,
    load_reference,
    make,
    naive,
)
from tests.vllm.forked import fork_engines

TOLERANCE = 1e-4
ENGINE = {"engine": "vllm", "max_model_tokens": 256, "kv_cache_gb": 0.125}
LAST = 3
# Longer than a block of vLLM's cache, which holds 128 tokens on CPUs.
LONG = tuple(np.random.default_rng(0).integers(3, SHARED["vocab_size"], size=size).tolist() for size in (130, 200))
EVERY = (*PROMPTS, *LONG)
SHOWN = (*OPEN, True, False)


def refused(role: Callable[..., str | None], config: Any) -> str | None:
    """What the product says of a model before anything starts; None where it takes it."""
    if reason := role(config, "vllm", on_gpus=True):
        return f"refused: {reason}"
    if reason := role(config, "vllm"):
        return f"refused on CPUs: {reason.partition(';')[0]}"
    (architecture,) = config.architectures
    return None if supports(architecture) else f"refused: vLLM has no {architecture}"


def verdicts(name: str, folder: Path) -> list[str]:
    """What the page says of an architecture on vLLM: as the policy, and as an expert.

    Raises:
        AssertionError: when a number is off, and the product does not refuse the model.
    """
    config = configuration(name, "vllm")
    policy, expert = refused(policy_refusal, config), refused(expert_refusal, config)
    if policy and expert:
        return [policy, expert]
    path = make(name, folder, "vllm")
    plain = load_reference(path)
    if policy is None:
        policy = judge(policy_errors(plain, path))
    if expert is None:
        expert = judge(expert_errors(plain, path))
    return [policy, expert]


def judge(errors: dict[str, float]) -> str:
    """`exact`, or an error that says what is off."""
    off = {what: error for what, error in errors.items() if not error < TOLERANCE}
    assert not off, f"off by {off}"
    return "exact"


def policy_errors(plain: FrozenModel, path: str) -> dict[str, float]:
    """Errors of log-probabilities (nats) in batches of prompts of all lengths, with and without a prefix."""
    policy = replace(load_embeddings(path), end_tokens=tuple(range(0, SHARED["vocab_size"], 6)))
    prefix = 0.5 * torch.randn(len(EVERY), SLOTS, policy.width, generator=torch.Generator().manual_seed(2))
    rows = list(zip(EVERY, SHOWN, prefix, strict=True))
    requests = [Request(np.array(prompt), None, 7 + row, opened) for row, (prompt, opened, _) in enumerate(rows)]
    positions: tuple[PrefixPosition, ...] = ("front", "after_bos")
    # Asked again, what vLLM keeps of a prompt is found in its cache.
    ways = {"greedy": (0.0, 1), "greedy again": (0.0, 1), "sampled": (0.7, SAMPLES)}
    errors = {}
    with closing(VllmPolicyEngine(policy, PolicyConfig(model=path, **ENGINE), "front", threads=1)) as engine:
        for position, (way, (temperature, samples)) in itertools.product(positions, ways.items()):
            engine.position = position
            sampling = Sampling(temperature=temperature, max_new_tokens=LIMIT, samples=samples)
            worst = 0.0
            for (prompt, opened, slots), group in zip(rows, engine.generate(requests, prefix, sampling), strict=True):
                for made in group:
                    tokens = made.tokens.tolist()
                    wanted = naive(plain, position, prompt, slots if opened else slots[:0], tokens, temperature)
                    chosen = of_tokens(wanted, tokens)
                    worst = max(worst, difference(torch.from_numpy(made.logprobs), chosen))
                    if not temperature:
                        worst = max(worst, difference(chosen, wanted.max(dim=1).values))
            errors[f"{way}, {position}"] = worst
    return errors


@torch.no_grad()
def expert_errors(plain: FrozenModel, path: str) -> dict[str, float]:
    """Errors of the last states, and how much less likely than the likeliest the answers' tokens are (nats)."""
    config = ExpertConfig(name="one", model=path, pool="last_k", last_k=LAST, **ENGINE)
    with closing(VllmEncoder(config, path, 1, lambda: None)) as encoder:
        found, answers = encoder.states(EVERY), encoder.answer(EVERY, LIMIT)
    errors = {"states": 0.0, "answers": 0.0}
    for prompt, states, answer in zip(EVERY, found, answers, strict=True):
        wanted = plain.body(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0, -LAST:]
        errors["states"] = max(errors["states"], difference(torch.from_numpy(states), wanted))
        likely = naive(plain, "front", prompt, torch.empty(0, plain.width), answer, 0.0)
        errors["answers"] = max(errors["answers"], difference(of_tokens(likely, answer), likely.max(dim=1).values))
    return errors


def of_tokens(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    """Each token's own, out of (tokens, vocabulary)."""
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest; infinite where there is no number."""
    return (found - wanted).abs().max().nan_to_num(nan=torch.inf).item()


def main(names: Sequence[str]) -> None:
    """Prints a line of JSON for each: its name, and its verdicts or what was off."""
    fork_engines()
    torch.set_num_threads(1)
    for name in names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = verdicts(name, Path(folder))
            except (AssertionError, ModelError, EngineDiedError) as error:
                found = [f"{type(error).__name__}: {error}"]
        print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
