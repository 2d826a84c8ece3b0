"""Curves of a run beyond reward: does attention sharpen as reward rises, and what the machine did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.watch.figure import COLOURS, drawn
from cluster.watch.series import History, Record

ENTROPY, REWARD = "router/attention_entropy", "reward/mean"
BLOCK = 10  # steps whose mean is one point of the detrended comparison
FEWEST = 5  # points, below which no correlation is told
STAGES = ("encode", "rollout", "reward", "learner")


@dataclass(frozen=True)
class Sharpening:
    """Spearman's rho between routing entropy and reward over steps, with p-values.

    rho, p: of the values themselves; two curves with a trend each are correlated whatever causes them.
    detrended_rho, detrended_p: of changes from one block of steps to the next, which have none.
    """

    rho: float
    p: float
    detrended_rho: float | None
    detrended_p: float | None

    @property
    def text(self) -> str:
        """In words."""
        said = f"Routing entropy against reward: rank correlation {self.rho:+.2f} (p = {self.p:.1g})"
        if self.detrended_rho is None or self.detrended_p is None:
            return f"{said}; too few steps to say what is left without the trends."
        without = f"{self.detrended_rho:+.2f} (p = {self.detrended_p:.1g})"
        return f"{said}; of changes over {BLOCK} steps, without the trends: {without}."


def sharpening(metrics: Sequence[Record]) -> Sharpening | None:
    """How entropy and reward went together; None where either does not vary, or steps are few."""
    from scipy.stats import spearmanr

    pairs = [(line[ENTROPY], line[REWARD]) for line in metrics if ENTROPY in line and REWARD in line]
    values = np.array(pairs, dtype=float)
    if len(values) < FEWEST or np.ptp(values[:, 0]) == 0 or np.ptp(values[:, 1]) == 0:
        return None
    whole = spearmanr(values[:, 0], values[:, 1])
    blocks = len(values) // BLOCK
    changes = np.diff(values[: blocks * BLOCK].reshape(blocks, BLOCK, 2).mean(axis=1), axis=0) if blocks else values[:0]
    if len(changes) < FEWEST or not np.ptp(changes, axis=0).all():
        return Sharpening(float(whole.statistic), float(whole.pvalue), None, None)
    detrended = spearmanr(changes[:, 0], changes[:, 1])
    return Sharpening(float(whole.statistic), float(whole.pvalue), float(detrended.statistic), float(detrended.pvalue))


def entropy_figure(metrics: Sequence[Record], path: Path) -> None:
    """Write a PNG: entropy and reward over steps, and against each other."""
    history = History(metrics)
    entropy, reward = history.series(ENTROPY), history.series(REWARD)
    with drawn(path, 16, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(entropy.steps, entropy.values, color=COLOURS[2], alpha=0.25, linewidth=0.8)
        left.plot(entropy.steps, entropy.smoothed, color=COLOURS[2], linewidth=2)
        left.set(title="Routing entropy, nats", xlabel="step")
        beside = left.twinx()
        beside.plot(reward.steps, reward.smoothed, color=COLOURS[0], linewidth=2)
        beside.set_ylabel("reward, smoothed", color=COLOURS[0])
        beside.grid(visible=False)
        known = dict(zip(reward.steps, reward.values, strict=True))
        points = [
            (x, known[step], step) for step, x in zip(entropy.steps, entropy.values, strict=True) if step in known
        ]
        if points:
            x, y, step = zip(*points, strict=True)
            shown = right.scatter(x, y, c=step, cmap="viridis", s=14)
            figure.colorbar(shown, ax=right, label="step")
        right.set(title="Reward against routing entropy", xlabel="routing entropy, nats", ylabel="reward")


def flow_figure(metrics: Sequence[Record], path: Path) -> None:
    """Write a PNG: tokens a second, seconds by stage, and staleness over steps."""
    history = History(metrics)
    with drawn(path, 16, 4.2) as figure:
        left, middle, right = figure.subplots(1, 3)
        speed = history.series("rollout/tokens_per_second")
        left.plot(speed.steps, speed.smoothed, color=COLOURS[0], linewidth=2)
        left.set(title="Completion tokens a second", xlabel="step", ylim=(0, None))
        for colour, stage in zip(COLOURS, STAGES, strict=False):
            series = history.series(f"time/{stage}_s")
            middle.plot(series.steps, series.smoothed, color=colour, label=stage)
        whole = history.series("time/step_s")
        middle.plot(whole.steps, whole.smoothed, color="#1f2933", label="whole step")
        middle.set(title="Seconds a step, by stage", xlabel="step", ylim=(0, None))
        middle.legend()
        for colour, name in zip(COLOURS, ("mean", "max"), strict=False):
            series = history.series(f"staleness/{name}")
            right.plot(series.steps, series.values, color=colour, label=name)
        right.set(title="Staleness, updates", xlabel="step", ylim=(-0.1, None))
        right.legend()
