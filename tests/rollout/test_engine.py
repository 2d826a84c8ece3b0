"""The engine, which shares rows between samples and drops what has ended, against one sample at a time, no cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from experts.loading import FrozenModel, load_frozen
from rollout.draws import token_uniforms
from rollout.engine import Request, TransformersEngine
from rollout.sequence import PrefixPosition
from rollout.types import Completion, FinishReason, Sampling
from tests.models import make

PROMPTS = ([5, 9, 4], [7, 3, 8, 6, 2], [4, 4])
LIMIT, SAMPLES, SLOTS = 5, 6, 3


@pytest.fixture(scope="module", params=["qwen2", "gpt_neox"])
def policy(request, tmp_path_factory) -> FrozenModel:
    """A random policy that ends at one token in four, so that samples part and end at every length."""
    folder = make(tmp_path_factory.mktemp("policies") / request.param, request.param)
    frozen = load_frozen(str(folder), "float32", "cpu", "policy")
    vocabulary = frozen.model.config.vocab_size
    return replace(frozen, end_tokens=tuple(range(0, vocabulary, 4)))


def one_by_one(
    policy: FrozenModel,
    prompt: list[int],
    prefix: torch.Tensor | None,
    head: int,
    draws: np.ndarray,
    temperature: float,
) -> tuple[list[int], list[float]]:
    """A completion, token by token, the whole sequence anew each time."""
    said: list[int] = []
    logprobs: list[float] = []
    while len(said) < LIMIT and (not said or said[-1] not in policy.end_tokens):
        tokens = policy.embed(torch.tensor([*prompt, *said]))
        if prefix is not None:
            tokens = torch.cat([tokens[:head], prefix, tokens[head:]])
        with torch.no_grad():
            logits = policy.model(inputs_embeds=tokens[None]).logits[0, -1].double()
        distribution = (logits / (temperature or 1.0)).softmax(0)
        below = distribution.cumsum(0)
        chosen = int(logits.argmax()) if temperature == 0 else int((below <= draws[len(said)] * below[-1]).sum())
        said.append(chosen)
        logprobs.append(float(distribution[chosen].log()))
    return said, logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("position", ["front", "after_bos", None])
def test_equals_one_sample_at_a_time(policy, position: PrefixPosition | None, temperature):
    shape = (len(PROMPTS), SLOTS, policy.width)
    prefix = None if position is None else torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3
    draws = [token_uniforms(3, ordinal, 0, SAMPLES, LIMIT) for ordinal in range(len(PROMPTS))]
    requests = [Request(tokens, uniforms) for tokens, uniforms in zip(PROMPTS, draws, strict=True)]
    sampling = Sampling(temperature=temperature, max_new_tokens=LIMIT, samples=SAMPLES)
    found = TransformersEngine(policy, position or "front").generate(requests, prefix, sampling)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        for sample in range(SAMPLES):
            slots = None if prefix is None else prefix[row]
            said, logprobs = one_by_one(
                policy, prompt, slots, int(position == "after_bos"), draws[row][sample], temperature
            )
            completion: Completion = found[row][sample]
            assert completion.tokens.tolist() == said
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
            assert (completion.finish is FinishReason.STOP) == (said[-1] in policy.end_tokens)
            lengths.add(len(said))
    assert temperature == 0 or len(lengths) > 2


def test_samples_that_agree_are_computed_once(policy, monkeypatch):
    """Greedy samples of a prompt never part: the policy sees one row a prompt, and none of those that ended."""
    rows: list[int] = []
    forward = policy.model.forward
    monkeypatch.setattr(
        policy.model, "forward", lambda *a, **k: rows.append(len(k["attention_mask"])) or forward(*a, **k)
    )
    requests = [Request(tokens, None) for tokens in PROMPTS]
    sampling = Sampling(temperature=0.0, max_new_tokens=LIMIT, samples=SAMPLES)
    found = TransformersEngine(policy, "front").generate(requests, None, sampling)
    lengths = [len(group[0].tokens) for group in found]
    assert rows == [len(PROMPTS)] + [n for step in range(1, LIMIT) if (n := sum(length > step for length in lengths))]
