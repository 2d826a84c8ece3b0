"""A LoRA adapter on the policy: its gradient, its versions, and the weights under it that never move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.adapter import AdapterError, LoraConfig, adapter_arrays, write_adapter
from experts.config import RouterConfig
from experts.loading import load_frozen, weights_sha256
from experts.state import Arrays, RouterError, RouterSnapshot, fitted
from learner.batch import global_denominators
from learner.engine import OptimizerState
from learner.learner import LearnerRank, LearnerState
from rollout.types import Group, Sampling
from tests.learner.world import World, backward, encode, flat, prompts, router_config, update

LORA = {"rank": 4}


@pytest.fixture(scope="module", params=["perceiver", "none"])
def adapted(request, policies, deepspeed_alone) -> World:
    """A world whose policy has an adapter, with and without a router."""
    config = router_config().model_dump() | {"kind": request.param}
    return World.of(policies["qwen2"], RouterConfig.model_validate(config), lora=LORA)


def learner_of(world: World, **settings) -> LearnerRank:
    """A lone rank with an adapter."""
    return LearnerRank(replace(world.spec(**settings), lora=LoraConfig.model_validate(LORA)), _alone())


def _alone():
    from learner.engine import Rendezvous

    return Rendezvous()


def moved(arrays: Arrays, size: float, seed: int = 5) -> Arrays:
    """A step away: the adapter's product is no longer zero."""
    rng = np.random.default_rng(seed)
    return {name: (a + size * rng.standard_normal(a.shape)).astype(np.float32) for name, a in arrays.items()}


def at_version_one(learner: LearnerRank) -> LearnerState:
    """A learner's state with two snapshots, both with an adapter that matters."""
    first = RouterSnapshot.of(moved(learner.snapshot().arrays, 0.05, 1), 0, 0)
    second = RouterSnapshot.of(moved(first.arrays, 0.02, 2), 1, 0)
    return LearnerState(second, OptimizerState(0, {}), {0: first, 1: second}, first.arrays)


def plain(world: World, learner: LearnerRank, groups: list[Group], position: str = "front") -> Arrays:
    """Gradients by plain torch: one forward a completion through router and adapted policy."""
    from experts.state import build_router, put_arrays
    from tests.learner.naive import naive_logprobs, prefix_of

    policy = load_frozen(str(world.policy), lora=LoraConfig.model_validate(LORA))
    router = build_router(world.router, world.shape, policy)
    config, adapter = learner.gradient.algorithm.config, policy.adapter
    assert adapter is not None
    put_arrays(router, learner.history[1].arrays)
    router = router.double()
    denominators = global_denominators(groups, None)
    routers = {}
    for version in (0, 1):
        routers[version] = build_router(world.router, world.shape, policy)
        put_arrays(routers[version], learner.history[version].arrays)
        routers[version] = routers[version].double()
    total = torch.zeros(())
    for group in groups:
        rewards = torch.tensor([s.reward for s in group.scores])
        worth = (rewards - rewards.mean()) / rewards.std()
        for completion, advantage in zip(group.completions, worth.tolist(), strict=True):

            def under(version: int | None, group: Group = group, ids: np.ndarray = completion.tokens) -> torch.Tensor:
                prefix = None
                if version is not None and world.router.kind != "none":
                    prefix = prefix_of(router if version == 1 else routers[0], group).float()
                return naive_logprobs(policy, group.prompt_tokens, prefix, ids, group.sampling.temperature, position)

            with torch.no_grad():
                adapter.put(adapter_arrays(learner.history[group.router.version].arrays))
                old = under(group.router.version)
                with adapter.off():
                    reference = under(None)
                correction = (old - torch.from_numpy(completion.logprobs)).exp().clamp_max(config.correction_cap)
            adapter.put(adapter_arrays(learner.history[1].arrays))
            mine = under(1)
            ratio = (mine - old).exp()
            clipped = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
            surrogate = torch.minimum(ratio * advantage, clipped * advantage)
            k3 = (reference - mine).exp() - 1 - (reference - mine)
            share = (-surrogate * correction + config.kl.coefficient * k3).mean() / denominators.completions
            share.backward()
            total = total + share.detach()
    found = {f"adapter.{n.replace('.', '|')}": p.grad.numpy() for n, p in adapter.parameters.items()}
    return found | {n: p.grad.float().numpy() for n, p in router.named_parameters() if p.grad is not None}


def test_gradients_are_plain_torch_s_on_policy_and_one_version_behind(adapted: World) -> None:
    learner = learner_of(adapted, staleness=1, kl={"coefficient": 0.3})
    state = at_version_one(learner)
    learner.restore(state, 0)
    some = prompts(6)
    rollouts = [adapted.scored(some[i::2], state.history[i]) for i in range(2)]
    groups = [g for rollout in rollouts for g in rollout.groups]
    sums = backward(learner, groups)
    found = learner.engine.gradients()
    learner.finish_update()
    assert sums.mismatch_max < 1e-4, "each group under its own version's adapter"
    assert sums.values["ratio"] != sums.values["tokens"] and sums.values["kl"] > 0
    wanted = plain(adapted, learner_state(adapted, state), groups)
    adapters = [name for name in found if name.startswith("adapter.")]
    assert adapters and {n for n in wanted if np.abs(wanted[n]).max() > 1e-9} >= set(adapters)
    for name, right in wanted.items():
        scale = np.linalg.norm(right)
        if scale > 1e-7:
            assert np.linalg.norm(found[name] - right) / scale < 2e-4, name


def learner_state(world: World, state: LearnerState) -> LearnerRank:
    """A rank that holds this state."""
    learner = learner_of(world, staleness=1, kl={"coefficient": 0.3})
    learner.restore(state, 0)
    return learner


def test_behind_a_closed_gate_the_adapter_learns_without_a_prefix(policies, deepspeed_alone) -> None:
    config = router_config().model_dump() | {"gate": True}
    world = World.of(policies["qwen2"], RouterConfig.model_validate(config), lora=LORA)
    learner = learner_of(world, staleness=1, learner={"groups": 16})
    learner.restore(at_version_one(learner), 0)
    groups = world.scored(prompts(16), learner.snapshot()).groups
    closed = [group for group in groups if not group.draws.open]
    assert 0 < len(closed) < len(groups)
    assert backward(learner, groups).mismatch_max < 1e-4
    learner.finish_update()
    backward(learner, closed)
    found = learner.engine.gradients()
    learner.finish_update()
    assert any(np.abs(g).max() > 1e-9 for name, g in found.items() if name.startswith("adapter."))


def test_an_update_moves_the_adapter_and_no_weight_of_the_policy(adapted: World) -> None:
    learner = learner_of(adapted)
    plain_hash = weights_sha256(load_frozen(str(adapted.policy)).model)
    assert learner.sha256() == adapted.worker.sha256() == plain_hash
    first = learner.snapshot()
    update(learner, adapted.scored(prompts(4), first))
    update(learner, adapted.scored(prompts(4, 4), learner.snapshot()))
    before, after = adapter_arrays(first.arrays), adapter_arrays(learner.snapshot().arrays)
    assert all(np.abs(after[name] - before[name]).max() > 0 for name in before)
    assert learner.sha256() == adapted.worker.sha256() == plain_hash
    proof = learner.trainable()
    assert proof["policy_with_gradient"] == [] and proof["optimised"] == proof["router"]


def test_the_untrained_adapter_changes_nothing_and_alone_means_without_one(adapted: World) -> None:
    sampling = Sampling(temperature=0.0, max_new_tokens=4, samples=1)
    learner = learner_of(adapted)
    some = prompts(5)

    def said(snapshot: RouterSnapshot, **how: Any) -> torch.Tensor:
        groups = adapted.worker.generate(some, sampling, snapshot, *encode(some), **how).groups
        return torch.from_numpy(np.concatenate([g.completions[0].logprobs for g in groups]))

    first = learner.snapshot()
    other = RouterSnapshot.of(moved(first.arrays, 0.1), 1, 0)
    alone = said(first, alone=True)
    no_slots = np.zeros((0, 1), np.float32)
    if adapted.router.kind == "none":
        assert torch.equal(said(first), alone)
        assert torch.equal(said(other, prefix=no_slots), said(other)), "without a prefix it keeps its adapter"
    else:
        assert torch.equal(said(first, prefix=no_slots), alone)
    changed = said(other)
    assert changed.shape != alone.shape or (changed - alone).abs().max() > 1e-3
    assert torch.equal(said(other, alone=True), alone)


def test_the_file_is_what_peft_reads(adapted: World, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    learner = learner_of(adapted)
    arrays = moved(learner.snapshot().arrays, 0.1)
    write_adapter(tmp_path / "a", adapter_arrays(arrays), LoraConfig.model_validate(LORA), str(adapted.policy))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapted.policy), tmp_path / "a")
    adapter = learner.policy.adapter
    assert adapter is not None
    adapter.put(adapter_arrays(arrays))
    tokens = torch.tensor([[5, 9, 4, 7]])
    with torch.no_grad():
        mine = learner.policy.model(tokens).logits
        torch.testing.assert_close(theirs(tokens).logits, mine, rtol=1e-5, atol=1e-5)
        with adapter.off():
            assert (learner.policy.model(tokens).logits - mine).abs().max() > 1e-3


def test_a_saved_router_fits_with_and_without_its_adapter(adapted: World) -> None:
    with_adapter = learner_of(adapted).snapshot().arrays
    plain_arrays = {name: a for name, a in with_adapter.items() if not name.startswith("adapter.")}
    saved = moved(with_adapter, 0.1)
    assert fitted(saved, plain_arrays, "x").keys() == plain_arrays.keys()
    back = fitted({n: saved[n] for n in plain_arrays}, with_adapter, "x")
    assert all(np.array_equal(back[n], (saved if n in plain_arrays else with_adapter)[n]) for n in with_adapter)
    name = next(iter(with_adapter))
    with pytest.raises(RouterError, match=r"there and .* here"):
        fitted({**saved, name: np.zeros((1, 2, 3), np.float32)}, with_adapter, "x")
    with pytest.raises(RouterError, match="it has no b"):
        fitted({}, {"b": np.zeros(1, np.float32)}, "x")


def test_unknown_targets_are_refused(policies) -> None:
    with pytest.raises(AdapterError, match=r"policy\.lora\.targets"):
        load_frozen(str(policies["qwen2"]), lora=LoraConfig(targets=("nowhere",)))


def test_a_learner_s_state_holds_the_adapter(adapted: World) -> None:
    learner = learner_of(adapted)
    update(learner, adapted.scored(prompts(4), learner.snapshot()))
    state = learner.state()
    again = learner_of(adapted)
    again.restore(state, 0)
    rollout = adapted.scored(prompts(4, 4), learner.snapshot())
    for each in (learner, again):
        update(each, rollout)
    assert torch.equal(flat(learner.snapshot().arrays), flat(again.snapshot().arrays))
    assert any(name.startswith("adapter.") for name in state.snapshot.arrays)
