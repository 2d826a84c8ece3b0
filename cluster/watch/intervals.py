"""95 % confidence intervals for accuracies and for differences between two systems.

A task is a stratum: a mean over tasks weighs each task alike, however many prompts it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054


class Interval(NamedTuple):
    """An estimate's lower and upper bound."""

    low: float
    high: float


class Accuracy(NamedTuple):
    """The share of right answers among `prompts` prompts."""

    share: float
    prompts: int


def wilson(accuracy: Accuracy, z: float = Z_95) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927); right also for 0 or all prompts.

    Raises:
        ValueError: when there are no prompts or the share is outside 0 to 1.
    """
    share, prompts = accuracy
    if prompts < 1 or not 0 <= share <= 1:
        raise ValueError(f"an accuracy needs prompts and a share from 0 to 1, got {share} of {prompts}")
    centre = (share + z * z / (2 * prompts)) / (1 + z * z / prompts)
    spread = z * math.sqrt(share * (1 - share) / prompts + z * z / (4 * prompts * prompts)) / (1 + z * z / prompts)
    return Interval(max(0.0, centre - spread), min(1.0, centre + spread))


def wilson_mean(accuracies: Sequence[Accuracy]) -> Interval:
    """Interval for the unweighted mean over tasks: Wilson's limits combined (Zou and Donner 2008).

    For one task this is Wilson's interval itself.
    """
    below, above = zip(*(_distances(accuracy) for accuracy in accuracies), strict=True)
    mean = sum(accuracy.share for accuracy in accuracies) / len(accuracies)
    return Interval(mean - _mean_spread(below), mean + _mean_spread(above))


def newcombe(first: Sequence[Accuracy], second: Sequence[Accuracy]) -> Interval:
    """Interval for mean(first) - mean(second) of two independent samples, task by task.

    For one task this is Newcombe's hybrid score interval (Newcombe 1998, method 10); several tasks combine
    the same limits (Zou and Donner 2008).

    Raises:
        ValueError: when the two do not have the same number of tasks.
    """
    down, up = [], []
    difference = 0.0
    for one, other in zip(first, second, strict=True):
        below_one, above_one = _distances(one)
        below_other, above_other = _distances(other)
        down.append(math.hypot(below_one, above_other))
        up.append(math.hypot(above_one, below_other))
        difference += (one.share - other.share) / len(first)
    return Interval(difference - _mean_spread(down), difference + _mean_spread(up))


def paired_bootstrap(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Percentile interval for mean(first) - mean(second) where both answered the same prompts.

    first, second: per task, one outcome (0 or 1) per prompt, in the same order.  Prompts are resampled in
    pairs and within their task; the seed is fixed, so the same outcomes always give the same interval.  See `bounded`.

    Raises:
        ValueError: when tasks or prompts do not match.
    """
    generator = np.random.default_rng(seed)
    means, tasks = np.zeros(resamples), []
    for one, other in zip(first, second, strict=True):
        if len(one) != len(other) or not len(one):
            raise ValueError(f"paired outcomes need the same prompts, got {len(one)} and {len(other)}")
        # Only how often each difference (-1, 0, 1) occurs matters, so draw the counts, not the prompts.
        values, counts = np.unique(np.asarray(one, float) - np.asarray(other, float), return_counts=True)
        drawn = generator.multinomial(len(one), counts / len(one), size=resamples)
        means += drawn @ values / len(one) / len(first)
        tasks.append(Accuracy(float(values @ counts) / len(one), len(one)))
    return bounded(means, tasks, lowest=-1.0)


def bounded(means: np.ndarray, tasks: Sequence[Accuracy], lowest: float) -> Interval:
    """The percentile interval of resampled means over tasks, and no narrower than what prompts cannot have shown.

    Resampling equal outcomes gives them again, and an interval without width.  But what none of n prompts has shown
    may still happen to as many as Wilson's upper limit for 0 of n says: where all answers are wrong, so many may be
    right.  Intervals of accuracies that are neither near 0 nor near 1 are wider than this by themselves.

    Args:
        tasks: the estimate and the number of prompts of each.
        lowest: that an outcome can be: 0 for an accuracy, -1 for a difference; the highest is 1.
    """
    low, high = (float(bound) for bound in np.percentile(means, [2.5, 97.5]))
    value = sum(task.share for task in tasks) / len(tasks)
    unseen = [wilson(Accuracy(0.0, task.prompts)).high for task in tasks]
    down = _mean_spread([rate * (task.share - lowest) for rate, task in zip(unseen, tasks, strict=True)])
    up = _mean_spread([rate * (1.0 - task.share) for rate, task in zip(unseen, tasks, strict=True)])
    return Interval(max(lowest, min(low, value - down)), min(1.0, max(high, value + up)))


def beats_the_best_of(rivals: int, difference: float, high: float) -> bool:
    """Whether the best of several rivals is shown to be better, though it was picked for being the best.

    With a dozen rivals as good as the first, the best of them was "better" 16 times in 100: so its limit is that of so
    many comparisons (Bonferroni's, taking the interval for a normal one).  That the first beats them all needs none.

    Args:
        difference, high: the first less that rival, and the upper limit of its 95 % interval.
    """
    wider = NormalDist().inv_cdf(1 - 0.025 / rivals) / Z_95
    return difference + (high - difference) * wider < 0


def _distances(accuracy: Accuracy) -> tuple[float, float]:
    """From the estimate down to Wilson's lower limit and up to the upper one."""
    low, high = wilson(accuracy)
    return accuracy.share - low, high - accuracy.share


def _mean_spread(distances: Sequence[float]) -> float:
    return math.sqrt(sum(distance * distance for distance in distances)) / len(distances)
