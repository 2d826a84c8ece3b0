"""Advantages of one group's completions.  Completions whose reward is not `ok` take no part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rollout.types import RewardStatus

NO_SIGNAL = 1e-6

Rewards = Float[Tensor, "groups samples"]
Ok = Bool[Tensor, "groups samples"]


def spread(rewards: Rewards, ok: Ok) -> Float[Tensor, " groups"]:
    """Largest minus smallest `ok` reward of each group; 0 for a group without any."""
    infinity = torch.tensor(float("inf"), dtype=rewards.dtype)
    high = torch.where(ok, rewards, -infinity).amax(dim=1)
    low = torch.where(ok, rewards, infinity).amin(dim=1)
    return torch.where(ok.any(dim=1), high - low, torch.zeros_like(high))


def _signal(rewards: Rewards, ok: Ok) -> Bool[Tensor, "groups samples"]:
    return ok & (spread(rewards, ok) >= NO_SIGNAL)[:, None]


def has_signal(rewards: Sequence[float], statuses: Sequence[RewardStatus]) -> bool:
    """Whether one group's rewards tell its completions apart: else every advantage is exactly 0.

    Dynamic sampling (DAPO, arXiv 2503.14476) ends the other groups as `filtered`.
    """
    ok = [reward for reward, status in zip(rewards, statuses, strict=True) if status is RewardStatus.OK]
    return bool(ok) and max(ok) - min(ok) >= NO_SIGNAL


def centered(rewards: Rewards, ok: Ok) -> Rewards:
    """Reward minus the group's mean (Dr.GRPO); exactly 0 where a group has no signal."""
    weight = ok.to(rewards.dtype)
    rewards = torch.where(ok, rewards, torch.zeros_like(rewards))
    mean = (rewards * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.where(_signal(rewards, ok), rewards - mean, torch.zeros_like(rewards))


def normalised(rewards: Rewards, ok: Ok) -> Rewards:
    """(reward - mean) / std with ddof 1 (GRPO); exactly 0, never noise, where a group has no signal."""
    difference = centered(rewards, ok)
    count = ok.sum(dim=1, keepdim=True).clamp_min(2).to(rewards.dtype)
    std = (difference.pow(2).sum(dim=1, keepdim=True) / (count - 1)).sqrt()
    return torch.where(difference == 0, difference, difference / std)


def leave_one_out(rewards: Rewards, ok: Ok) -> Rewards:
    """Reward minus the mean of the group's other completions (RLOO): centered * n / (n - 1)."""
    count = ok.sum(dim=1, keepdim=True).clamp_min(2).to(rewards.dtype)
    return centered(rewards, ok) * count / (count - 1)
