"""What one measured process is told and what it answers."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SYSTEMS = ("distributed", "inline", "trl")


@dataclass(frozen=True)
class Job:
    """One process's work.

    system: one of `SYSTEMS`.  config, overrides: as for `musketeers train`.
    folder: a folder of its own, for what it writes; its answer goes there too.
    until: time (seconds since the epoch) after which it starts no further step.
    """

    system: str
    config: str
    overrides: tuple[str, ...]
    warmup: int
    steps: int
    folder: str
    until: float

    @classmethod
    def from_command_line(cls) -> Job:
        """The job a process was started with."""
        values = json.loads(sys.argv[1])
        return cls(**{**values, "overrides": tuple(values["overrides"])})

    def as_argument(self) -> str:
        """What `from_command_line` reads."""
        return json.dumps(asdict(self))

    @property
    def answer(self) -> Path:
        """Where the answer is written."""
        return Path(self.folder) / "answer.json"

    @property
    def out_of_time(self) -> bool:
        """Whether no further step may start."""
        return time.time() > self.until

    def finish(self, samples_per_step: int, steps: list[dict[str, float]]) -> None:
        """Writes the answer.

        steps: seconds by stage of every step, those of the warm-up included; `step` is the whole step.
        """
        measured = steps[self.warmup :]
        answer: dict[str, Any] = {"samples_per_step": samples_per_step, "warmup": self.warmup, "steps": measured}
        self.answer.write_text(json.dumps(answer))
