"""A policy so small that expectations are sums: 4 tokens, one of them the end, at most 2 tokens a completion.

Parameters are the logits of the first token and of the second after each first one.  `code_gradient` is the
expectation of what the learner computes; `written` and the functions after it are docs/mathematics.md, written down
without ratios, masks or the learner's functions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from learner.algorithms import TokenBatch, build_algorithm
from learner.config import AlgorithmConfig
from learner.losses import Denominators

END, LENGTH, BETA = 3, 5, 0.3
COMPLETIONS = [(END,)] + [(a, b) for a in range(3) for b in range(4)]
SIZE = torch.tensor([len(y) for y in COMPLETIONS])
VALID = torch.tensor([[True, len(y) == 2] for y in COMPLETIONS])
# Ties among them: some groups have no signal.
REWARDS = torch.tensor([0.0, 1, 0, 0.5, 1, 0, 0, 2, 1, 0.25, 1, 0, -1], dtype=torch.float64)
JUNK = -7.7  # what a padding column holds


def parameters(seed: int, near: Tensor | None = None, distance: float = 1.0) -> Tensor:
    """(4 states, 4 tokens) logits: random, or a random step away from others."""
    step = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * distance
    return step if near is None else near + step


def logprobs(theta: Tensor) -> Tensor:
    """(completions, 2) log-probability of each token; the column behind an end token is junk."""
    table = theta.log_softmax(dim=1)
    rows = [
        torch.stack([table[0, y[0]], table[1 + y[0], y[1]] if len(y) == 2 else table.new_tensor(JUNK)])
        for y in COMPLETIONS
    ]
    return torch.stack(rows)


def whole(p: Tensor) -> Tensor:
    """(completions,) product of each completion's token probabilities."""
    return torch.where(VALID, p, 1.0).prod(dim=1)


def others(p: Tensor) -> Tensor:
    """(completions, 2) product of the probabilities of a completion's other token."""
    return torch.where(VALID, p, 1.0).flip(1)


@cache
def groups(samples: int) -> Tensor:
    """(13 ** samples, samples) every group, in order of sampling."""
    return torch.tensor(list(itertools.product(range(len(COMPLETIONS)), repeat=samples)))


@dataclass(frozen=True)
class Setting:
    """Parameters of the routers involved: trained, sampling as recomputed, sampling as the engine had it, reference."""

    theta: Tensor
    old: Tensor
    sampler: Tensor
    reference: Tensor
    samples: int = 3
    rewards: Tensor = REWARDS


def code_gradient(config: AlgorithmConfig, setting: Setting, kept: Tensor | None = None) -> tuple[Tensor, bool, bool]:
    """Expected gradient over all groups drawn from the sampler; whether clip and correction acted anywhere.

    kept: (groups,) the groups that are trained on, as a share of which the expectation is then taken.
    """
    theta = setting.theta.clone().requires_grad_(True)
    mine, old, sampler = logprobs(theta), logprobs(setting.old), logprobs(setting.sampler)
    reference = None if config.kl.reference == "none" else logprobs(setting.reference)
    algorithm, every = build_algorithm(config), groups(setting.samples)
    chance = whole(sampler.exp())[every].prod(dim=1)
    if kept is not None:
        every, chance = every[kept], chance[kept] / chance[kept].sum()
    totals = SIZE[every].sum(dim=1)
    expected, clipped, corrected = torch.zeros((), dtype=torch.float64), False, False
    for total in totals.unique().tolist():
        denominators = Denominators(setting.samples, total, LENGTH)

        def loss(rows: Tensor, denominators: Denominators = denominators) -> tuple[Tensor, Tensor, Tensor]:
            batch = TokenBatch(
                mine[rows],
                old[rows],
                sampler[rows],
                None if reference is None else reference[rows],
                setting.rewards[rows][None],
                torch.ones(1, setting.samples, dtype=torch.bool),
                VALID[rows],
            )
            terms = algorithm.loss(batch, denominators)
            return terms.loss, terms.clipped.any(), terms.corrected.any()

        losses, clips, caps = torch.func.vmap(loss)(every[totals == total])
        expected = expected + (losses * chance[totals == total]).sum()
        clipped, corrected = clipped | bool(clips.any()), corrected | bool(caps.any())
    return torch.autograd.grad(expected, theta)[0], clipped, corrected


def advantage(kind: str, rewards: list[float]) -> list[float]:
    """By the book."""
    count = len(rewards)
    mean = sum(rewards) / count
    if max(rewards) - min(rewards) < 1e-6:
        return [0.0] * count
    if kind == "rloo":
        return [r - (sum(rewards) - r) / (count - 1) for r in rewards]
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (count - 1))
    return [(r - mean) / (1.0 if kind == "dr_grpo" else deviation) for r in rewards]


def paid(config: AlgorithmConfig, setting: Setting) -> Tensor:
    """(completions,) rewards, less the penalty where it is taken off the reward."""
    if config.kl.estimator != "k1_reward" or config.kl.reference == "none":
        return setting.rewards
    ratio = logprobs(setting.old) - logprobs(setting.reference)
    return setting.rewards - config.kl.coefficient * torch.where(VALID, ratio, 0.0).sum(dim=1)


def token_weight(config: AlgorithmConfig, every: Tensor) -> Tensor:
    """(groups, samples) weight of each token of a completion in the loss."""
    samples = every.shape[1]
    if config.aggregation == "token":
        return (1.0 / SIZE[every].sum(dim=1, keepdim=True).double()).expand(-1, samples)
    return 1.0 / (
        samples
        * (SIZE[every].double() if config.aggregation == "sequence" else torch.full(every.shape, LENGTH).double())
    )


def moved(config: AlgorithmConfig, setting: Setting, p: Tensor) -> Tensor:
    """(completions, 2) `p`, times the disagreement of the sampling engine that the correction leaves undone."""
    old, sampler = logprobs(setting.old).exp(), logprobs(setting.sampler).exp()
    if config.correction == "icepop":
        trusted = (config.icepop_low * sampler <= old) & (old <= config.icepop_high * sampler)
        return torch.where(trusted, p, 0.0)
    counted = torch.minimum(old, config.correction_cap * sampler) if config.correction == "tis" else sampler
    return p * counted / old


def sides(config: AlgorithmConfig, setting: Setting, mine: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    """(completions, 2) what stands for a token's probability where its advantage is positive, and where negative.

    mine: the trained policy's log-probabilities, with gradient; without `clip` the bounds are left out.
    """
    p, now, old = mine.exp(), logprobs(setting.theta).exp(), logprobs(setting.old).exp()
    above, below = 1 + config.eps_high, 1 - config.eps_low
    if config.kind == "gspo":
        # The completion's ratio, seen as a function of this token alone.
        length = SIZE[:, None].double()
        ratio = (p * others(now) / whole(old)[:, None]).pow(1 / length)
        top, bottom = (ratio.clamp(max=above), ratio.clamp(min=below)) if clip else (ratio, ratio)
        return old * length * top, old * length * bottom
    if config.kind == "cispo":
        held = torch.minimum(torch.maximum(now, below * old), above * old) if clip else now
        return held * mine, held * mine
    return (torch.minimum(p, above * old), torch.maximum(p, below * old)) if clip else (p, p)


def written(config: AlgorithmConfig, setting: Setting, clip: bool = False) -> Tensor:
    """Gradient of the objective of docs/mathematics.md, by autograd.

    Token by token: the sampler chooses everything but one token, that token comes from the trained policy, and is
    worth its completion's advantage in its group.
    """
    theta = setting.theta.clone().requires_grad_(True)
    every, rewards = groups(setting.samples), paid(config, setting)
    table = torch.tensor([advantage(config.kind, row) for row in rewards[every].tolist()], dtype=torch.float64)
    mine, mu = logprobs(theta), logprobs(setting.sampler).exp()
    chance = whole(mu)[every]
    neighbours = chance.prod(dim=1, keepdim=True) / chance
    weight = token_weight(config, every) * neighbours
    shown = VALID[every]
    up, down = ((others(mu) * moved(config, setting, side))[every] for side in sides(config, setting, mine, clip))
    worth = torch.where(table[:, :, None] > 0, up, down) * table[:, :, None]
    objective = -(torch.where(shown, worth, 0.0) * weight[:, :, None]).sum()
    if config.kl.reference != "none" and config.kl.estimator != "k1_reward":
        k3 = (logprobs(setting.reference) - mine).exp() - 1 + mine - logprobs(setting.reference)
        counted = moved(config, setting, mine.exp()) if config.kl.estimator == "k3_weighted" else mu
        penalty = torch.where(shown, (others(mu) * counted * k3)[every], 0.0)
        objective = objective + config.kl.coefficient * (penalty * weight[:, :, None]).sum()
    return torch.autograd.grad(objective, theta)[0]


def published_gspo(config: AlgorithmConfig, setting: Setting) -> Tensor:
    """Gradient of GSPO's objective as its authors write it: one clipped ratio a completion, its mean over the group."""
    theta = setting.theta.clone().requires_grad_(True)
    every = groups(setting.samples)
    table = torch.tensor([advantage("gspo", row) for row in setting.rewards[every].tolist()], dtype=torch.float64)
    ratio = (whole(logprobs(theta).exp()) / whole(logprobs(setting.old).exp())).pow(1 / SIZE.double())[every]
    held = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
    chance = whole(logprobs(setting.sampler).exp())[every].prod(dim=1)
    objective = (chance * torch.minimum(ratio * table, held * table).mean(dim=1)).sum()
    return torch.autograd.grad(-objective, theta)[0]


def gradient_of(objective: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Autograd of a function of the parameters."""
    theta = theta.clone().requires_grad_(True)
    return torch.autograd.grad(objective(theta), theta)[0]


def mean_reward(theta: Tensor) -> Tensor:
    """E[reward]."""
    return (whole(logprobs(theta).exp()) * REWARDS).sum()


def sequence_kl(theta: Tensor, reference: Tensor) -> Tensor:
    """KL of whole completions."""
    mine = torch.where(VALID, logprobs(theta), 0.0).sum(dim=1)
    return (mine.exp() * (mine - torch.where(VALID, logprobs(reference), 0.0).sum(dim=1))).sum()


def token_kl(first: Tensor, second: Tensor, visited_by: Tensor) -> Tensor:
    """KL(first || second) of the next-token distributions, summed over the states a policy visits."""
    a, b = first.log_softmax(dim=1), second.log_softmax(dim=1)
    visits = torch.cat([torch.ones(1, dtype=torch.float64), visited_by.softmax(dim=1)[0, :END]])
    return (visits * (a.exp() * (a - b)).sum(dim=1)).sum()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    scale = wanted.abs().max().item()
    return (found - wanted).abs().max().item() / (scale if not math.isclose(scale, 0.0, abs_tol=1e-12) else 1.0)
