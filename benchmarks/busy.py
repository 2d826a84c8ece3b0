"""A verifier that takes its time; in a file of its own, because scoring processes import it by name."""

from __future__ import annotations

import time

from rollout.types import Prompt

WORK_S = 0.05


class Busy:
    """Computes for 50 ms, or hangs for as long as it may: a stand-in for answers that are run as code."""

    def score(self, completion: str, prompt: Prompt) -> float:
        """1."""
        until = time.perf_counter() + (3600 if completion == "hang" else WORK_S)
        while time.perf_counter() < until:
            pass
        return 1.0
