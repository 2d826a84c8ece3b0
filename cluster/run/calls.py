"""What the training loop keeps of calls under way, and who takes its records."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.run.fleet import Fault, Reference, Stage
from cluster.run.scoring import WaveReport
from learner.learner import LearnerState
from rollout.types import Group, Prompt


@dataclass(frozen=True)
class Wave:
    """Some prompts on their way together: references to their scored rollout and features, and the report.

    finished: when they were scored, by the monotonic clock.
    """

    rollout: Reference
    features: list[Reference]
    report: WaveReport
    finished: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Features:
    """Every expert's call for the features of some prompts."""

    prompts: list[Prompt]
    experts: list[Stage]


@dataclass(frozen=True)
class Sent:
    """A call under way: where it goes through, and what will come of it.

    sampled: a few bytes by which the driver sees that the rollout worker is free again.
    """

    ordinals: list[int]
    stages: list[Stage]
    sampled: Reference
    scored: Reference
    report: Reference
    features: list[Reference]
    policy: str
    verifier: str


class Sink(Protocol):
    """What becomes of a run's records; the driver itself writes nothing."""

    def step(self, record: dict[str, Any]) -> None:
        """One finished step."""
        ...

    def groups(self, step: int, groups: list[Group]) -> None:
        """The groups of a step, only when the configuration keeps them."""
        ...

    def checkpoint(self, step: int, learner: LearnerState, driver: dict[str, Any], finished: list[Group]) -> None:
        """Everything needed to go on from here."""
        ...

    def dead(self, ordinal: int, task: str, fault: Fault) -> None:
        """A prompt that failed too often and is given up."""
        ...

    async def validate(self, step: int, router: Reference) -> None:
        """A look at validation prompts, when one is due."""
        ...
