"""The self-check of loaded models: an exact one passes it, and a fault is named by the property that it breaks."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

import experts.chat
import experts.encoder
import experts.kv_cache
import learner.logprobs
import learner.selfcheck
import rollout.engine
from experts.config import CacheConfig, ExpertConfig, RouterConfig
from experts.expert import Expert
from experts.loading import FrozenModel, ModelError, load_embeddings, load_frozen
from experts.selfcheck import REMEDIES, Finding, check_expert, check_tokenizer
from experts.state import embedding_rms
from experts.vllm_engine import Sample
from learner.selfcheck import check_learner
from rollout.config import PolicyConfig
from rollout.engine import Request, TransformersEngine, lay_out_requests
from rollout.selfcheck import check_policy
from rollout.sequence import PromptBatch, lay_out_prompts, running_positions, with_prefix
from rollout.types import Sampling
from rollout.vllm import VllmPolicyEngine
from rollout.worker import RolloutWorker
from tests.architectures import ARCHITECTURES, documented, make
from tests.models import tokenizer

Patch = pytest.MonkeyPatch
KINDS = ("begins", "qwen2", "qwen3_next", "gemma4, per-layer embeddings", "mpt")
PAGE = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of an architecture's tiny model."""

    @functools.cache
    def path(name: str) -> str:
        made = make("qwen2" if name == "begins" else name, tmp_path_factory.mktemp("model"))
        if name == "begins":  # one whose tokenizer puts a token in front of a text and another behind it
            tokens = tokenizer()
            backend = tokens.backend_tokenizer
            special = [("Z", tokens.convert_tokens_to_ids("Z")), ("<eos>", tokens.eos_token_id)]
            backend.post_processor = TemplateProcessing(single="Z $A <eos>", special_tokens=special)
            settings = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>", "bos_token": "Z"}
            PreTrainedTokenizerFast(tokenizer_object=backend, **settings).save_pretrained(made)
        return made

    return path


def of_policy(path: str, position: Any = "front", dtype: str = "float32") -> list[Finding]:
    policy = load_frozen(path, dtype)
    return [*check_tokenizer(policy), *check_policy(TransformersEngine(policy, position), rollout_rms(policy))]


def of_learner(path: str, position: Any = "front", dtype: str = "float32") -> list[Finding]:
    return check_learner(load_frozen(path, dtype), position)


def of_expert(path: str, dtype: str = "float32", **settings: Any) -> list[Finding]:
    config = ExpertConfig(name="one", model=path, dtype=dtype, **settings)
    encoder = experts.encoder.TransformersEncoder(config, path)
    return [*check_tokenizer(encoder.frozen), *check_expert(encoder, config, encoder.frozen.tokenize)]


def rollout_rms(policy: FrozenModel) -> float:
    """By the name that a mutation replaces."""
    return embedding_rms(policy)


def failing(findings: Sequence[Finding]) -> list[str]:
    return [f"{finding.name}: {finding.detail}" for finding in findings if not finding.ok]


# What passes.


def all_findings(path: str, dtype: str, policy: bool) -> list[Finding]:
    found = of_expert(path, dtype)
    for position in ("front", "after_bos") if policy else ():
        found += [*of_policy(path, position, dtype), *of_learner(path, position, dtype)]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_an_exact_model_passes(name: str, path_of: Callable[[str], str]) -> None:
    found = [*of_policy(path_of(name)), *of_learner(path_of(name)), *of_expert(path_of(name))]
    assert not failing(found)
    assert {finding.name for finding in found} == set(REMEDIES)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_exact_model_passes_in_every_precision(name: str, dtype: str, tmp_path: Path) -> None:
    assert not failing(all_findings(make(name, tmp_path), dtype, documented()[name][0] == "exact"))


# What is caught: each fault put back, and the property that names it.


def old_layout(prompts: Any, slots: int, pad_id: int, position: Any, shown: Any = None, device: Any = "cpu") -> Any:
    """[slots][padding][prompt]."""
    new = lay_out_prompts(prompts, slots, pad_id, position, shown, device)
    longest, head = max(map(len, prompts)), 1 if position == "after_bos" else 0
    shape = (len(prompts), slots + longest)
    tokens, mask, slot = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for row, prompt in enumerate(prompts):
        opened = torch.ones(slots, dtype=torch.bool) if shown is None else shown[row]
        mask[row, head : head + slots] = opened.long()
        slot[row, head : head + slots] = torch.where(opened, torch.arange(slots), -1)
        behind = shape[1] - len(prompt) + head
        tokens[row, :head], tokens[row, behind:] = torch.tensor(prompt[:head]), torch.tensor(prompt[head:])
        mask[row, :head], mask[row, behind:] = 1, 1
    return PromptBatch(tokens, mask, running_positions(mask), slot, new.slots)


def padding_between(patch: Patch) -> None:
    patch.setattr(rollout.engine, "lay_out_prompts", old_layout)
    patch.setattr(learner.selfcheck, "lay_out_prompts", old_layout)


def plain_cache(patch: Patch) -> None:
    for module in (rollout.engine, learner.logprobs):
        patch.setattr(module, "new_cache", lambda config: DynamicCache())


def nothing_refused(patch: Patch) -> None:
    patch.setattr(rollout.engine, "policy_refusal", lambda *_: None)


def state_of_the_first_row(patch: Patch) -> None:
    def select(cache: Any, rows: Tensor) -> None:
        for layer in cache.layers:
            for states, key in experts.kv_cache._tensors(layer):
                own = torch.zeros_like(rows) if states is not vars(layer) else rows
                states[key] = states[key][own]

    patch.setattr(rollout.engine, "select_rows", select)


def state_not_selected(patch: Patch) -> None:
    inner = experts.kv_cache._tensors
    patch.setattr(experts.kv_cache, "_tensors", lambda layer: (p for p in inner(layer) if p[0] is vars(layer)))


def unit_of_the_weight(patch: Patch) -> None:
    def rms(policy: FrozenModel) -> float:
        return float(policy.model.get_input_embeddings().weight.pow(2).mean().sqrt())

    patch.setitem(globals(), "rollout_rms", rms)


def no_ids(patch: Patch) -> None:
    patch.setattr(FrozenModel, "inputs", lambda self, tokens, embedded: {"inputs_embeds": embedded})


def other_ids(patch: Patch) -> None:
    inner = FrozenModel.inputs
    patch.setattr(FrozenModel, "inputs", lambda self, tokens, embedded: inner(self, tokens * 0, embedded))


def width_of_the_hidden_states(patch: Patch) -> None:
    patch.setattr(FrozenModel, "width", property(lambda self: self.model.config.hidden_size))


def end_token_behind(patch: Patch) -> None:
    inner = FrozenModel.tokenize
    patch.setattr(FrozenModel, "tokenize", lambda self, messages: [*inner(self, messages), self.end_tokens[0]])


def contents_with_control_tokens(patch: Patch) -> None:
    def tokenize(frozen: FrozenModel, messages: Any) -> list[int]:
        return list(frozen.tokenizer(frozen.chat.render(messages))["input_ids"])

    patch.setattr(FrozenModel, "tokenize", tokenize)


def clean_up(patch: Patch) -> None:
    def load(*arguments: Any) -> FrozenModel:
        tokens = tokenizer()
        tokens.clean_up_tokenization_spaces = True
        return replace(load_frozen_as_it_is(*arguments), tokenizer=tokens)

    load_frozen_as_it_is = load_frozen
    patch.setitem(globals(), "load_frozen", load)


def no_begin_token(patch: Patch) -> None:
    inner = FrozenModel.tokenize
    patch.setattr(FrozenModel, "tokenize", lambda self, messages: inner(self, messages)[1:])


def begin_token_twice(patch: Patch) -> None:
    inner = FrozenModel.tokenize
    patch.setattr(FrozenModel, "tokenize", lambda self, messages: [self.tokenizer.bos_token_id, *inner(self, messages)])


def begin_lost_in_the_cut(patch: Patch) -> None:
    inner = experts.chat.Chat.read

    def read(self: Any, messages: Any, most: int | None = None) -> Any:
        made = inner(self, messages)
        return made._replace(tokens=made.tokens[-(most or 0) :])

    patch.setattr(experts.chat.Chat, "read", read)


def unknown_tokens(patch: Patch) -> None:
    patch.setattr(FrozenModel, "tokenize", lambda self, messages: [3, 10**6])


def slots_of_a_closed_gate(patch: Patch) -> None:
    def all_open(requests: Any, *arguments: Any) -> Any:
        return lay_out_requests([replace(request, open=True) for request in requests], *arguments)

    patch.setattr(rollout.engine, "lay_out_requests", all_open)


def prefix_of_the_neighbour(patch: Patch) -> None:
    def rolled(embedded: Tensor, prefix: Tensor | None, batch: PromptBatch) -> Tensor:
        return with_prefix(embedded, None if prefix is None else prefix.roll(1, 0), batch)

    patch.setattr(rollout.engine, "with_prefix", rolled)


def slots_turned_round(patch: Patch) -> None:
    patch.setattr(rollout.engine, "with_prefix", lambda e, prefix, batch: with_prefix(e, prefix.flip(1), batch))


def prefix_detached(patch: Patch) -> None:
    patch.setattr(learner.logprobs, "with_prefix", lambda e, p, batch: with_prefix(e, p.detach(), batch))


def prefix_barely_attached(patch: Patch) -> None:
    patch.setattr(learner.logprobs, "with_prefix", lambda e, p, b: with_prefix(e, p.detach() + 0 * p, b))


def gradient_not_a_number(patch: Patch) -> None:
    def spoiled(embedded: Tensor, prefix: Tensor, batch: Any) -> Tensor:
        made = with_prefix(embedded, prefix, batch)
        made.register_hook(lambda gradient: gradient * float("nan"))
        return made

    patch.setattr(learner.logprobs, "with_prefix", spoiled)


def gradient_of_one_row(patch: Patch) -> None:
    def first(embedded: Tensor, prefix: Tensor, batch: Any) -> Tensor:
        return with_prefix(embedded, torch.cat([prefix[:1], prefix[1:].detach()]), batch)

    patch.setattr(learner.logprobs, "with_prefix", first)


def completions_of_other_groups(patch: Patch) -> None:
    inner = experts.kv_cache.select_rows
    patch.setattr(learner.logprobs, "select_rows", lambda cache, rows: inner(cache, rows.flip(0)))


def logprobs_without_temperature(patch: Patch) -> None:
    inner = rollout.engine.pick

    def pick(logits: Tensor, rows: Tensor, temperature: float, uniforms: Any) -> Any:
        chosen, _ = inner(logits, rows, temperature, uniforms)
        return chosen, logits.log_softmax(dim=-1)[rows, chosen]

    patch.setattr(rollout.engine, "pick", pick)


def coarse_cache(patch: Patch) -> None:
    inner = experts.kv_cache.select_rows

    def select(cache: Any, rows: Tensor) -> None:
        inner(cache, rows)
        for layer in cache.layers:
            layer.keys = (2 * layer.keys).round() / 2

    patch.setattr(rollout.engine, "select_rows", select)


def left_padding(patch: Patch) -> None:
    inner = experts.encoder.pad
    patch.setattr(experts.encoder, "pad", lambda rows, pad_id, left: inner(rows, pad_id, True))
    patch.setattr(experts.encoder, "pool", lambda states, mask, how: states[:, -1])


def states_of_the_neighbour(patch: Patch) -> None:
    inner = experts.encoder.pool
    patch.setattr(experts.encoder, "pool", lambda *arguments: inner(*arguments).roll(1, 0))


def overflow(patch: Patch) -> None:
    inner = experts.encoder.pool
    patch.setattr(experts.encoder, "pool", lambda *arguments: inner(*arguments) * float("inf"))


def answers_padded_right(patch: Patch) -> None:
    inner = experts.encoder.pad
    patch.setattr(experts.encoder, "pad", lambda rows, pad_id, left: inner(rows, pad_id, False))


def changed_model(change: Callable[[Any], None]) -> Callable[[Patch], None]:
    """A fault of the model itself."""

    def apply(patch: Patch) -> None:
        def load(*arguments: Any, **settings: Any) -> FrozenModel:
            frozen = load_frozen(*arguments, **settings)
            change(frozen.model)
            return frozen

        for module in (globals(), vars(experts.encoder)):
            patch.setitem(module, "load_frozen", load)

    load_frozen = globals()["load_frozen"]
    return apply


def forward_without(*names: str) -> Callable[[Any], None]:
    """A model that takes these arguments and does not look at them."""

    def change(model: Any) -> None:
        inner = model.forward

        @functools.wraps(inner)
        def forward(*arguments: Any, **settings: Any) -> Any:
            return inner(*arguments, **{key: value for key, value in settings.items() if key not in names})

        model.forward = forward

    return change


def ids_beside(model: Any) -> None:
    """Reads a prefix by the embeddings that its tokens would have."""
    inner = model.forward

    @functools.wraps(inner)
    def forward(*arguments: Any, **settings: Any) -> Any:
        if settings.get("inputs_embeds") is not None:
            settings["inputs_embeds"] = settings["inputs_embeds"] * 1.05
        return inner(*arguments, **settings)

    model.forward = forward


def slow(name: str, wanted: str, fault: Callable[[Patch], None]) -> Any:
    return pytest.param(name, wanted, fault, marks=pytest.mark.slow)


SIBLINGS = [  # of what the fast tests see
    *(
        slow(name, "batch", padding_between)
        for name in ("mistral, window", "qwen2, window", "gemma2", "phi3", "gpt_oss", "cohere2", "gpt_neo", "lfm2")
    ),
    *(slow(name, "cache", plain_cache) for name in ("qwen3_5", "qwen3_next", "granitemoehybrid", "falcon_h1")),
    *(slow(name, "cache", nothing_refused) for name in ("mamba2", "rwkv", "recurrent_gemma")),
    slow("gemma3n", "embeddings", no_ids),
]
POLICY_FAULTS: list[Any] = [
    *SIBLINGS,
    *((name, "batch", padding_between) for name in ("gemma3", "mpt")),
    ("lfm2", "cache", plain_cache),
    ("mamba", "cache", nothing_refused),
    ("qwen3_next", "cache", state_of_the_first_row),
    ("lfm2", "cache", state_not_selected),
    ("gemma3", "unit", unit_of_the_weight),
    ("gemma4, per-layer embeddings", "prefix", no_ids),  # of tokens alone it finds the ids
    ("gemma4, per-layer embeddings", "embeddings", other_ids),
    ("opt, narrow embeddings", "width", width_of_the_hidden_states),
    ("qwen2", "end", end_token_behind),
    ("qwen2", "ids", unknown_tokens),
    ("qwen2", "contents", contents_with_control_tokens),
    ("qwen2", "decoding", clean_up),
    ("begins", "beginning", no_begin_token),
    ("begins", "beginning", begin_token_twice),
    ("begins", "end", end_token_behind),
    ("qwen2", "gate", slots_of_a_closed_gate),
    # Faults that nobody has reported.
    ("qwen2", "batch", prefix_of_the_neighbour),
    ("qwen2", "cache", slots_turned_round),
    ("qwen2", "cache", logprobs_without_temperature),
    ("qwen2", "cache", coarse_cache),
    ("qwen2", "batch", changed_model(forward_without("attention_mask"))),
    ("gpt2", "batch", changed_model(forward_without("position_ids"))),
    ("gpt2", "repeatable", changed_model(lambda model: model.train())),
    ("llama", "embeddings", changed_model(ids_beside)),
]


def id_of(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("name", "wanted", "fault"), POLICY_FAULTS, ids=id_of)
def test_a_fault_of_the_policy_is_named(
    name: str, wanted: str, fault: Callable[[Patch], None], path_of: Any, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    first, *_ = [*failing(of_policy(path_of(name))), "nothing"]
    assert first.startswith(f"{wanted}: "), first


LEARNER_FAULTS: list[Any] = [
    *((name, "learner", padding_between) for name in ("gemma3", "mpt")),
    ("jamba", "learner", lambda patch: None),  # refused as a policy for this
    ("qwen3_5", "learner", plain_cache),
    ("lfm2", "learner", state_not_selected),
    ("qwen2", "learner", completions_of_other_groups),
    ("qwen2", "gradient", prefix_detached),
    ("qwen2", "gradient", prefix_barely_attached),
    ("qwen2", "gradient", gradient_not_a_number),
    ("qwen2", "gradient", gradient_of_one_row),
]


@pytest.mark.parametrize(("name", "wanted", "fault"), LEARNER_FAULTS, ids=id_of)
def test_a_fault_of_the_learner_is_named(
    name: str, wanted: str, fault: Callable[[Patch], None], path_of: Any, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    first, *_ = [*failing(of_learner(path_of(name))), "nothing"]
    assert first.startswith(f"{wanted}: "), first


EXPERT_FAULTS: list[Any] = [
    ("gpt2", "expert batch", left_padding),
    ("begins", "cut", begin_lost_in_the_cut),
    ("qwen2", "expert batch", states_of_the_neighbour),
    ("qwen2", "states", overflow),
    ("qwen2", "answers", answers_padded_right),
    ("qwen2", "end", end_token_behind),
    ("gpt2", "expert batch", changed_model(lambda model: model.train())),
]


@pytest.mark.parametrize(("name", "wanted", "fault"), EXPERT_FAULTS, ids=id_of)
def test_a_fault_of_an_expert_is_named(
    name: str, wanted: str, fault: Callable[[Patch], None], path_of: Any, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    first, *_ = [*failing(of_expert(path_of(name))), "nothing"]
    assert first.startswith(f"{wanted}: "), first


# Through the engine of vLLM, which is asked about itself alone.


class OtherEngine:
    """Answers as vLLM's engine does, by transformers; scale: of the embeddings that it is given."""

    def __init__(self, path: str, scale: float = 1.0) -> None:
        self.policy, self.position, self.scale = load_embeddings(path), "front", scale
        self.engine, self._model = self, load_frozen(path)
        self._completions = functools.partial(VllmPolicyEngine._completions, self)  # type: ignore[arg-type]

    def generate(self, requests: Any, prefix: Any, *sampling: Any) -> Any:
        if not isinstance(requests[0], Request):  # token ids, to the engine inside
            made = self._answers([Request(np.array(tokens), None) for tokens in requests], None)
            return [[Sample(c.tokens.tolist(), c.logprobs.tolist(), False) for c in group] for group in made]
        with pytest.MonkeyPatch.context() as patch:
            given = FrozenModel.inputs
            patch.setattr(FrozenModel, "inputs", lambda self, t, e: given(self, t, e * scale))
            scale = self.scale
            return self._answers(requests, prefix)

    def _answers(self, requests: Any, prefix: Any) -> Any:
        policy = replace(self._model, end_tokens=())
        greedy = Sampling(temperature=0.0, max_new_tokens=4, samples=1)
        return TransformersEngine(policy, "front").generate(requests, prefix, greedy)


VLLM_FAULTS: list[Any] = [
    ("nothing", 1.0, lambda patch: None),
    ("embeddings", 32**0.5, lambda patch: None),  # of Gemma and Granite, scaled a second time
    ("embeddings", 1.02, lambda patch: None),
    ("batch", 1.0, padding_between),
    ("batch", 1.0, prefix_of_the_neighbour),
    ("gate", 1.0, slots_of_a_closed_gate),
    ("unit", 1.0, unit_of_the_weight),
]


@pytest.mark.parametrize(("wanted", "scale", "fault"), VLLM_FAULTS)
def test_a_fault_of_another_engine_is_named(
    wanted: str, scale: float, fault: Callable[[Patch], None], path_of: Any, monkeypatch: Patch
) -> None:
    fault(monkeypatch)
    engine: Any = OtherEngine(path_of("gemma3"), scale)
    first, *_ = [*failing(check_policy(engine, rollout_rms(engine.policy))), "nothing"]
    assert first.startswith(wanted), first


# What a run makes of it.


def test_a_worker_refuses_by_name_and_a_key_lets_it_pass(path_of: Any, monkeypatch: Patch) -> None:
    path = path_of("mpt")
    padding_between(monkeypatch)
    router = RouterConfig(width=16, latents=3, heads=4)
    with pytest.raises(ModelError, match=r"fails the self-check of the policy: batch: off by .*self_check: false"):
        RolloutWorker(PolicyConfig(model=path), path, router, seed=0)
    RolloutWorker(PolicyConfig(model=path, self_check=False), path, router, seed=0).close()


def test_an_expert_whose_states_are_all_the_same_is_told_to_pool_the_last(path_of: Any) -> None:
    path = path_of("qwen2")
    for pool, layer in (("first", -1), ("first", 1)):
        config = ExpertConfig(name="maths", model=path, pool=pool, layer=layer)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=r"expert 'maths': two prompts: .* take pool: last"):
            Expert(config, path, CacheConfig())
        Expert(config.model_copy(update={"self_check": False}), path, CacheConfig())
    for pool in ("last", "mean", "last_k"):
        Expert(config.model_copy(update={"pool": pool}), path, CacheConfig())


def test_a_first_token_that_sees_everything_may_stand_for_the_prompt(path_of: Any, monkeypatch: Patch) -> None:
    inner = experts.encoder.pool
    monkeypatch.setattr(experts.encoder, "pool", lambda states, mask, how: inner(states, mask, "mean"))
    assert not failing(of_expert(path_of("qwen2"), pool="first"))


def test_short_limits_leave_room_for_the_check(path_of: Any) -> None:
    for limit in (1, 2, 9):
        assert not failing(of_expert(path_of("gpt2"), max_tokens=limit))
    policy = load_frozen(path_of("gemma3"))
    assert not failing(check_policy(TransformersEngine(policy, "after_bos"), embedding_rms(policy), longest=12))


def test_nothing_of_a_run_changes_by_it(path_of: Any) -> None:
    path = path_of("qwen3")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    of_policy(path), of_learner(path)
    expert = Expert(ExpertConfig(name="one", model=path), path, CacheConfig())
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])
    assert expert.cache.hits == expert.cache.misses == 0
    assert not [name for name, p in load_frozen(path).model.named_parameters() if p.grad is not None]


def test_what_is_read_is_bounded(path_of: Any, monkeypatch: Patch) -> None:
    """As docs/models.md says."""
    read = dict.fromkeys(("policy", "learner", "expert"), 0)
    for who, check in zip(read, (of_policy, of_learner, of_expert), strict=True):

        def count(model: Any, who: str = who) -> None:
            def add(_: Any, given: Any) -> None:
                read[who] += given[0].shape[:2].numel()

            model.model.layers[0].register_forward_pre_hook(add)

        with monkeypatch.context() as patch:
            changed_model(count)(patch)
            assert not failing(check(path_of("llama")))
    assert read == {"policy": 340, "learner": 217, "expert": 201}
