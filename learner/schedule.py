"""The learning rate of each step, a pure function: nothing to save, the same on resume and on replay."""

from __future__ import annotations

import math

from learner.config import LearnerConfig


def learning_rate(config: LearnerConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step`, counted from 1, in a run of `steps`.

    A run that is resumed with more steps follows the longer schedule from there on.
    """
    warm = min(1.0, step / (config.warmup_steps + 1))
    done = min(1.0, step / max(steps, 1))
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[config.schedule]
    return config.learning_rate * warm * (config.final_rate + (1.0 - config.final_rate) * fall)
