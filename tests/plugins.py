"""A task that random models can learn in seconds, answer with digits; a verifier and a router that hang."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from experts.router import Perceiver, RouterOutput
from rewards.config import DataConfig, TaskConfig
from rollout.types import Prompt


class Digits:
    """Rewards the share of digits in the answer; a random policy starts near one in eight."""

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.task, self.data = task, data

    def entries(self) -> list[Prompt]:
        """Distinct short prompts."""
        texts = [self.data.template.format(question=f"say {a} and {b}") for a in range(20) for b in range(10)]
        return [
            Prompt(
                ordinal=index,
                task=self.task.name,
                messages=({"role": "user", "content": text},),
                answer=str(index % 10),
            )
            for index, text in enumerate(texts)
        ]

    def score(self, completion: str, prompt: Prompt) -> float:
        """Share of digits."""
        return sum(c.isdigit() for c in completion) / max(len(completion), 1)


class Mute(Digits):
    """Never gives a verdict."""

    def score(self, completion: str, prompt: Prompt) -> float:
        """Nothing, for an hour."""
        time.sleep(3600)
        return 0.0


class SleepyRouter(Perceiver):
    """Hangs once, in whatever process comes first, when the file named in SLEEPY_FLAG appears."""

    def forward(self, features: Sequence[Tensor], visible: Tensor) -> RouterOutput:
        """See `Perceiver`."""
        try:
            os.unlink(os.environ["SLEEPY_FLAG"])
        except OSError:
            return super().forward(features, visible)
        time.sleep(3600)
        raise AssertionError("slept through")


class SociableRouter(Perceiver):
    """Wants every expert to be there."""

    def forward(self, features: Sequence[Tensor], visible: Tensor, *pick: Any) -> RouterOutput:
        """See `Perceiver`."""
        if not visible.all():
            raise ValueError("somebody is missing")
        return super().forward(features, visible, *pick)


def rarely_right(completion: str, prompt: Prompt) -> float:
    """Right for about one text in a dozen, whatever it says."""
    return float(zlib.crc32(completion.encode(errors="replace")) % 12 == 0)
