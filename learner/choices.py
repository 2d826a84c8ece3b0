"""The policy gradient of a router's own choices: which expert, or whether there is a prefix at all.

All completions of a group share the choice, so their advantages, which sum to zero, say nothing about it.  What does
is how the group fares beside the other groups of its task in the same update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from learner.losses import clipped_surrogate
from rollout.types import Group, RewardStatus

CHOICE_CLIP = (0.2, 0.2)  # of a choice's ratio, down and up; the algorithms' own bounds are for tokens or completions


def group_advantages(groups: Sequence[Group]) -> dict[int, float]:
    """By ordinal: a group's mean reward less the mean of the update's other groups of its task.

    Groups without a verdict count for nothing, and one without company gets 0.
    """
    by_task: dict[str, dict[int, float]] = {}
    for group in groups:
        rewards = [score.reward for score in group.scores if score.status is RewardStatus.OK]
        if rewards:
            by_task.setdefault(group.prompt.task, {})[group.ordinal] = float(np.mean(rewards))
    found = dict.fromkeys((group.ordinal for group in groups), 0.0)
    for means in by_task.values():
        total, others = sum(means.values()), len(means) - 1
        found |= {ordinal: mean - (total - mean) / others for ordinal, mean in means.items() if others}
    return found


@dataclass(frozen=True)
class Choices:
    """What some groups' router chose, for `forward` and for the loss.

    taken, old: (groups,) choices and their log-probabilities when they were taken.
    """

    taken: Int[Tensor, " groups"]
    old: Float[Tensor, " groups"]

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device) -> Choices:
        """From the groups' draws."""
        taken = torch.tensor([group.draws.choice for group in groups], device=device)
        return cls(taken, torch.tensor([group.draws.choice_logprob for group in groups], device=device))

    def __call__(self, logprobs: Float[Tensor, "groups options"]) -> Int[Tensor, " groups"]:
        """Takes what was taken."""
        return self.taken

    def __getitem__(self, rows: Tensor) -> Choices:
        return Choices(self.taken[rows], self.old[rows])


def choice_loss(
    options: Float[Tensor, "groups options"],
    choices: Choices,
    advantages: Float[Tensor, " groups"],
    eps: tuple[float, float],
    entropy_bonus: float,
) -> tuple[Float[Tensor, ""], float]:
    """The summed loss of these groups' choices, and their summed entropy.

    Args:
        options: log-probabilities under the router being trained, with gradient.
        eps: the ratio's clip, down and up.
    """
    chosen = options.gather(1, choices.taken[:, None])[:, 0]
    ratio = (chosen - choices.old).exp()
    policy, _ = clipped_surrogate(ratio[:, None], advantages, *eps)
    # An option that is not allowed has probability 0 and adds nothing.
    entropy = -torch.where(options > float("-inf"), options.exp() * options.clamp_min(-1e4), 0.0).sum()
    return policy.sum() - entropy_bonus * entropy, entropy.item()
