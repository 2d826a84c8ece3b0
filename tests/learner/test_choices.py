"""The policy gradient of a router's own choices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from experts.config import RouterConfig
from learner.choices import Choices, choice_loss, group_advantages
from rollout.types import Group, RewardStatus, Score
from rollout.worker import Choice
from tests.learner.world import World, backward, encode, prompts, router_config, score, update

WIDE = (0.9, 9.0)


@pytest.fixture(scope="module")
def chooser(policies, deepspeed_alone) -> World:
    """A world whose router shows one expert, or no prefix."""
    config = router_config().model_dump() | {"kind": "top1", "gate": True}
    return World.of(policies["qwen2"], RouterConfig.model_validate(config))


def test_on_average_the_gradient_is_that_of_the_expected_reward() -> None:
    """All choices of three prompts with two options each, enumerated in float64."""
    torch.manual_seed(0)
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    reward = torch.rand(3, 2, dtype=torch.float64)
    chances = logits.softmax(dim=-1)
    (wanted,) = torch.autograd.grad(-(chances * reward).sum() / 3, logits)
    found = torch.zeros_like(logits)
    for taken in torch.cartesian_prod(*[torch.arange(2)] * 3):
        mine = reward.gather(1, taken[:, None])[:, 0]
        advantages = mine - (mine.sum() - mine) / 2
        options = logits.log_softmax(dim=-1)
        old = options.detach().gather(1, taken[:, None])[:, 0]
        loss, _ = choice_loss(options, Choices(taken, old), advantages, WIDE, 0.0)
        (gradient,) = torch.autograd.grad(loss / 3, logits)
        found += old.sum().exp() * gradient
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_stale_choice_is_weighed_by_its_ratio_and_clipped() -> None:
    options = torch.tensor([[0.8, 0.2], [0.2, 0.8]]).log().requires_grad_()
    taken, old = torch.tensor([0, 0]), torch.tensor([0.5, 0.5]).log()
    loss, entropy = choice_loss(options, Choices(taken, old), torch.tensor([1.0, 1.0]), (0.2, 0.2), 0.0)
    assert loss.item() == pytest.approx(-(1.2 + 0.4))
    loss.backward()
    assert options.grad is not None
    assert options.grad[:, 0].tolist() == pytest.approx([0.0, -0.4]), "above the clip nothing pulls further"
    assert entropy == pytest.approx(2 * -(0.8 * np.log(0.8) + 0.2 * np.log(0.2)))


def test_an_option_that_is_not_allowed_has_no_part_in_the_entropy() -> None:
    options = torch.tensor([[0.0, float("-inf")]], requires_grad=True)
    loss, entropy = choice_loss(options, Choices(torch.tensor([0]), torch.zeros(1)), torch.ones(1), WIDE, 0.1)
    loss.backward()
    assert entropy == 0 and options.grad is not None and torch.isfinite(options.grad).all()


def group(ordinal: int, task: str, *rewards: float | None) -> Group:
    """A group of which only its rewards matter."""
    from tests.pipeline.fake_fleet import finished_group

    made = finished_group(ordinal)
    scores = [Score(reward=0.0, status=RewardStatus.TIMEOUT) if r is None else Score(reward=r) for r in rewards]
    return replace(made, prompt=replace(made.prompt, task=task), scores=tuple(scores))


def test_a_group_is_measured_by_the_others_of_its_task() -> None:
    some = [group(0, "a", 1.0, 0.0), group(1, "a", 0.0, None), group(2, "a", 1.0, 1.0), group(3, "b", 1.0, 1.0)]
    found = group_advantages([*some, group(4, "a", None, None)])
    assert found == pytest.approx({0: 0.5 - 0.5, 1: 0 - 0.75, 2: 1 - 0.25, 3: 0.0, 4: 0.0})


def test_choices_follow_their_chances_and_without_draws_the_most_likely_one() -> None:
    chances = torch.tensor([[0.25, 0.75]]).log().expand(1000, 2)
    taken = Choice(list(np.random.default_rng(0).random(1000)))(chances)
    assert 0.70 < taken.float().mean() < 0.80
    assert Choice(None)(chances).all()


def test_what_a_rollout_chose_is_noted_and_seen_by_the_learner(chooser: World) -> None:
    learner = chooser.learner()
    rollout = chooser.scored(prompts(24), learner.snapshot(), samples=2)
    taken = [g.draws.choice for g in rollout.groups]
    assert set(taken) == {0, 1, 2}
    assert all(g.draws.open == (g.draws.choice < 2) == bool(g.prefix_hash) for g in rollout.groups)
    first = 1 / (2 + np.exp(-2.0))
    assert np.exp([g.draws.choice_logprob for g in rollout.groups if g.draws.open]) == pytest.approx(first, rel=1e-4)
    sums = update(learner, rollout).sums
    assert sums.values["choices"] == 24 and sums.values["closed"] == taken.count(2)
    assert sums.mismatch_max < 1e-4


def test_the_router_comes_to_choose_what_pays(chooser: World) -> None:
    learner = chooser.learner(kl={"coefficient": 0.0}, learner={"learning_rate": 3e-3})
    for start in range(0, 160, 16):
        rollout = chooser.roll(prompts(16, start), learner.snapshot())
        paid = rollout.with_groups([score(g, [float(g.draws.choice == 1)] * 4) for g in rollout.groups])
        update(learner, paid)
    some = prompts(20, 1000)
    from rollout.types import Sampling

    greedy = Sampling(temperature=0.0, max_new_tokens=2, samples=1)
    after = chooser.worker.generate(some, greedy, learner.snapshot(), *encode(some), training=False)
    assert {g.draws.choice for g in after.groups} == {1}


def test_a_closed_gate_is_the_frozen_policy(chooser: World) -> None:
    """The same draws, the same tokens and log-probabilities, in one batch with prompts whose gate is open."""
    snapshot = chooser.learner().snapshot()
    some = prompts(24)
    from rollout.types import Sampling

    sampling = Sampling(temperature=1.0, max_new_tokens=6, samples=3)
    found = chooser.worker.generate(some, sampling, snapshot, *encode(some)).groups
    alone = chooser.worker.generate(some, sampling, snapshot, alone=True).groups
    closed = [i for i, g in enumerate(found) if not g.draws.open]
    assert 0 < len(closed) < len(some)
    for i, (mine, theirs) in enumerate(zip(found, alone, strict=True)):
        same = all(
            a.tokens.tolist() == b.tokens.tolist() for a, b in zip(mine.completions, theirs.completions, strict=True)
        )
        assert same == (i in closed)
        for a, b in zip(mine.completions, theirs.completions, strict=True) if i in closed else ():
            assert np.abs(a.logprobs - b.logprobs).max() < 1e-5


def test_groups_with_a_closed_gate_teach_the_gate_alone(chooser: World) -> None:
    learner = chooser.learner(kl={"coefficient": 0.5})
    rollout = chooser.scored(prompts(24), learner.snapshot())
    closed = [g for g in rollout.groups if not g.draws.open]
    sums = backward(learner, closed)
    found = learner.engine.gradients()
    learner.finish_update()
    assert not sums.values.get("tokens")
    moved = {name for name, g in found.items() if np.abs(g).max() > 1e-9}
    assert "choose.read.0.1.weight" in moved and "output" not in moved


def test_choices_wait_until_rewards_have_taught_a_prefix(chooser: World) -> None:
    learner = chooser.learner(choice_after=2)
    moved = []
    for start in range(0, 72, 24):
        before = dict(learner.snapshot().arrays)
        update(learner, chooser.scored(prompts(24, start), learner.snapshot()))
        after = learner.snapshot().arrays
        moved.append({name.partition(".")[0] for name in before if not np.array_equal(before[name], after[name])})
    assert ["choose" in names for names in moved] == [False, False, True]
    assert all("output" in names for names in moved), "the prefix learns from the first update on"
