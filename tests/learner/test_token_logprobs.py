"""Chunks of logits and gradients made on the way, against whole logits and autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3_5TextConfig,
)

import learner.gradient
import learner.logprobs
from benchmarks.learner_memory import whole_logprobs
from experts.adapter import LoraConfig
from experts.loading import FrozenModel, ModelError, load_frozen
from learner.gradient import PrefixGradient
from learner.learner import LearnerRank
from learner.logprobs import completion_logprobs
from learner.token_logprobs import Head, token_statistics
from rollout.engine import pick
from rollout.sequence import lay_out_completions, lay_out_prompts
from rollout.types import Rollout
from tests.learner.test_shared_prompt import COMPLETIONS, PROMPTS
from tests.learner.world import World, backward, prompts, update
from tests.tensors import Allocations

SAME = 1e-9  # in float64
SHAPE: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0}
GROUPED = SHAPE | {"num_key_value_heads": 2}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
# Every way from hidden states to logits that there is: capped, divided, multiplied, a decoder in a decoder, and
# one that transformers' `get_decoder` does not find; windows, convolutions and recurrent states in the cache.
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=2.0, sliding_window=4),
    "granite": GraniteConfig(**GROUPED, logits_scaling=3.0),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.3),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2),
    "llama4": Llama4TextConfig(**GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=1),
    "lfm2": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "qwen3_5": Qwen3_5TextConfig(**GROUPED, **DELTA, layer_types=["linear_attention", "full_attention"]),
}
every_head = pytest.mark.parametrize("family", CONFIGS)


def frozen(family: str) -> FrozenModel:
    """A random policy in float64."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).double().eval().requires_grad_(False)
    return FrozenModel(family, family, model, None, (1,), 0)


def laid_out(policy: FrozenModel, slots: int = 2) -> tuple[Any, Tensor, Any]:
    """Prompts, a prefix that wants a gradient, and completions of unequal lengths, some of them alike."""
    shape = (len(PROMPTS), slots, policy.width)
    prefix = torch.from_numpy(np.random.default_rng(1).standard_normal(shape)).requires_grad_(True)
    batch = lay_out_prompts(PROMPTS, slots, policy.pad_id)
    return batch, prefix, lay_out_completions(batch, COMPLETIONS, policy.pad_id)


def with_gradient(how: Callable[..., Any], policy: FrozenModel, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and entropies of the real tokens, and the gradient of a weighted sum to the prefix."""
    batch, prefix, completions = laid_out(policy)
    found = how(policy, batch, prefix, completions, 0.7, *more)
    weights = torch.arange(1.0, found.logprobs.numel() + 1).double().sin().reshape(found.logprobs.shape)
    (gradient,) = torch.autograd.grad((found.logprobs * weights)[completions.valid].sum(), prefix)
    return found.logprobs[completions.valid].detach(), found.entropy[completions.valid], gradient


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Relative to their sizes."""
    for mine, right in zip(found, wanted, strict=True):
        assert right.norm() > 0
        assert (mine - right).norm() < SAME * right.norm()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_chunks_are_whole_logits_and_autograd(data: st.DataObject) -> None:
    count, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    words, chunk = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 10))
    temperature = data.draw(st.sampled_from([1.0, 0.3, 1.7]))
    cap, scale = data.draw(st.sampled_from([None, 0.5, 30.0])), data.draw(st.sampled_from([1.0, 0.06, 8.0]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(words, width, generator=rng, dtype=torch.float64)
    hidden = torch.randn(count, width, generator=rng, dtype=torch.float64).requires_grad_(True)
    tokens = torch.randint(0, words, (count,), generator=rng)
    weights = torch.randn(count, generator=rng, dtype=torch.float64)

    def head(some: Tensor) -> Tensor:
        logits = some @ weight.T * scale
        return logits if cap is None else (logits / cap).tanh() * cap

    right = (head(hidden) / temperature).log_softmax(dim=-1)
    wanted = right[torch.arange(count), tokens]
    (slope,) = torch.autograd.grad((wanted * weights).sum(), hidden, retain_graph=True)
    entropy = -(right.exp() * right).sum(dim=-1)
    for head_trains in (False, True):
        found = token_statistics(head, hidden, tokens, temperature, chunk, head_trains)
        (mine,) = torch.autograd.grad((found.logprobs * weights).sum(), hidden)
        torch.testing.assert_close(found.logprobs, wanted, rtol=SAME, atol=SAME)
        torch.testing.assert_close(found.entropy, entropy, rtol=SAME, atol=SAME)
        torch.testing.assert_close(mine, slope, rtol=SAME, atol=SAME)
        assert not found.entropy.requires_grad
    with torch.no_grad():
        assert torch.equal(token_statistics(head, hidden, tokens, temperature, chunk).logprobs, found.logprobs)


def test_a_temperature_divides_the_logits_and_half_precision_is_raised_first() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_(True)
    tokens = torch.tensor([0, 1, 2, 3, 4, 0])
    found = token_statistics(lambda some: some, logits, tokens, 0.5, 4)
    p = (logits.float() / 0.5).softmax(dim=-1)
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.exp(), p[torch.arange(6), tokens])
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(p).entropy())
    found.logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


@every_head
def test_hidden_states_and_head_are_the_model_s_own(family: str) -> None:
    policy = frozen(family)
    batch, _, _ = laid_out(policy)
    inputs = {"input_ids": batch.tokens, "use_cache": False}
    head = Head(policy)
    hidden = head.hidden_states(**inputs)
    assert "forward" not in vars(policy.model.get_decoder()), "left behind"
    assert torch.equal(head(hidden.flatten(0, 1)), policy.model(**inputs).logits.flatten(0, 1))
    assert hidden.shape == (*batch.tokens.shape, 32)


@every_head
def test_values_and_gradients_are_those_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = frozen(family)
    wanted = with_gradient(whole_logprobs, policy)
    for elements in (1, 61 * 4, 2**25):  # one token at a time, four, and all
        monkeypatch.setattr(learner.logprobs, "CHUNK", elements)
        assert_same(with_gradient(completion_logprobs, policy), wanted)


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), None])
def test_adapters_get_the_gradient_of_whole_logits(policies: dict[str, Path], targets: tuple[str, ...] | None) -> None:
    policy = load_frozen(str(policies["llama"]), "float64", lora=LoraConfig(rank=2, targets=targets), seed=1)
    assert policy.adapter is not None
    torch.manual_seed(5)
    policy.adapter.put({name: torch.randn_like(p) / 10 for name, p in policy.adapter.parameters.items()})
    found = []
    for how in (whole_logprobs, completion_logprobs, lambda *a: completion_logprobs(*a, True)):
        batch, prefix, completions = laid_out(policy)
        logprobs = how(policy, batch, prefix, completions, 0.7).logprobs
        logprobs[completions.valid].pow(2).sum().backward()
        taken = policy.adapter.take_gradients()
        assert min(gradient.norm() for gradient in taken.values()) > 0
        found.append((*taken.values(), prefix.grad))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_nothing_as_large_as_all_logits_is_ever_there(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**GROUPED | {"vocab_size": 4000})
    policy = FrozenModel("", "", AutoModelForCausalLM.from_config(config).eval().requires_grad_(False), None, (1,), 0)
    rng = np.random.default_rng(0)
    batch = lay_out_prompts([[5, 6], [7]], 2, 0)
    completions = lay_out_completions(batch, [list(rng.integers(2, 4000, (10, 30))) for _ in range(2)], 0)
    monkeypatch.setattr(learner.logprobs, "CHUNK", 40_000)
    largest = {}
    for how in (whole_logprobs, completion_logprobs):
        prefix = torch.randn(2, 2, 32, requires_grad=True)
        with Allocations() as watched:
            found = how(policy, batch, prefix, completions, 1.0)
            found.logprobs.sum().backward()
            pick(torch.randn(4, 61), torch.arange(4), 1.0, torch.rand(4))
        largest[how] = watched.largest
    assert largest[whole_logprobs] == 600 * 4000, "the watch sees nothing"
    assert largest[completion_logprobs] == 4000 * 32, "the weights, which are larger than a chunk"


def test_a_model_that_hides_its_hidden_states_is_refused() -> None:
    class Plain(nn.Linear):
        def get_decoder(self) -> nn.Module:
            return self

    with pytest.raises(ModelError, match="Plain keeps its hidden states to itself"):
        Head(FrozenModel("", "odd", Plain(2, 2), None, (1,), 0))


@every_head
def test_checkpointing_changes_no_bit(family: str) -> None:
    policy = frozen(family)
    plain, saving = (with_gradient(completion_logprobs, policy, how) for how in (False, True))
    for mine, right in zip(saving, plain, strict=True):
        assert torch.equal(mine, right)


def test_checkpointing_keeps_little_and_can_go_backwards_twice() -> None:
    policy = frozen("llama")
    kept, gradients = {}, {}
    for how in (False, True):
        batch, prefix, completions = laid_out(policy)
        saved: dict[int, int] = {}

        def note(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logprobs = completion_logprobs(policy, batch, prefix, completions, 1.0, how).logprobs
        kept[how] = sum(saved.values())
        gradients[how] = [torch.autograd.grad(logprobs.sum(), prefix, retain_graph=True)[0] for _ in range(2)]
    assert kept[True] < kept[False] / 3
    for gradient in gradients[True]:
        assert torch.equal(gradient, gradients[False][0])


def test_checkpointing_needs_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = frozen("llama")
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", type("Other", (), {}))
    batch, prefix, completions = laid_out(policy)
    with pytest.raises(ModelError, match=r"learner\.checkpoint_activations cannot find the layers"):
        completion_logprobs(policy, batch, prefix, completions, 1.0, True)


def gradients_of(rank: LearnerRank, rollout: Rollout) -> dict[str, np.ndarray]:
    """Of the router."""
    backward(rank, rollout.groups)
    found = rank.engine.gradients()
    rank.finish_update()
    return found


@pytest.mark.usefixtures("deepspeed_alone")
def test_the_learner_s_gradients_are_those_of_whole_logits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = world.scored(prompts(4), world.learner().snapshot(), temperature=0.9)
    kl = {"kl": {"coefficient": 0.3}}
    saving = world.learner(learner={"checkpoint_activations": True}, **kl)
    assert saving.gradient.checkpoint_activations
    found = {"chunks": gradients_of(world.learner(**kl), rollout), "checkpointed": gradients_of(saving, rollout)}
    monkeypatch.setattr(learner.gradient, "completion_logprobs", whole_logprobs)
    wanted = gradients_of(world.learner(**kl), rollout)
    chunks, right = (np.concatenate([of[name].ravel() for name in wanted]) for of in (found["chunks"], wanted))
    assert np.linalg.norm(chunks - right) < 1e-6 * np.linalg.norm(right)
    assert all(np.array_equal(found["chunks"][name], found["checkpointed"][name]) for name in wanted)


@pytest.mark.usefixtures("deepspeed_alone")
@pytest.mark.parametrize("saving", [False, True])
def test_a_bfloat16_policy_teaches_a_float32_router(
    world: World, saving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = world.scored(prompts(4), world.learner().snapshot())
    single = gradients_of(world.learner(), rollout)
    spec = replace(world.spec(learner={"checkpoint_activations": saving}), policy_dtype="bfloat16")
    rank = LearnerRank(spec, world.learner().place)
    assert {p.dtype for p in rank.policy.model.parameters()} == {torch.bfloat16}
    dtypes = set()
    own = PrefixGradient.__call__

    def watched(*given: Any) -> Any:
        gradient, sums = own(*given)
        dtypes.add(gradient.dtype)
        return gradient, sums

    monkeypatch.setattr(PrefixGradient, "__call__", watched)
    half = gradients_of(rank, rollout)
    assert dtypes == {torch.float32}
    assert {p.dtype for p in rank.engine.module.parameters()} == {torch.float32}
    one, other = (np.concatenate([found[name].ravel() for name in sorted(single)]) for found in (single, half))
    assert one @ other > 0.98 * np.linalg.norm(one) * np.linalg.norm(other)
    before = rank.snapshot().arrays
    update(rank, world.scored(prompts(4, 4), rank.snapshot()))
    assert any(not np.array_equal(before[name], rank.snapshot().arrays[name]) for name in before)
