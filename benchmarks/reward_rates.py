"""Completions a second that a reward worker scores, as JSON; of the checkout that this Python imports `rewards` from.

    python -P benchmarks/reward_rates.py chain_sum number

`benchmarks/rewards.py --against CHECKOUT` runs it in two checkouts in turns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

from rewards.config import DataConfig, RewardsConfig, TaskConfig
from rewards.sources import all_entries
from rewards.worker import RewardWorker
from rollout.types import Prompt

SAMPLES, PROMPTS_A_CALL = 8, 32
# What is cheap is scored for longer than a scoring process is used, so that replacing it counts.
PROMPTS = {"chain_sum": 2048, "number": 1024, "leg_counting": 1024}
OF_ITS_OWN = "chain_sum"  # questions for verifiers that are none of a data set


def answers(name: str) -> tuple[list[tuple[Prompt, list[str]]], object]:
    """Prompts with completions, half of them right and no two alike, and their verifier."""
    verifier = name if name in ("number", "math", "text") else None
    count = PROMPTS.get(name, 64)
    task = TaskConfig(name=name, dataset=OF_ITS_OWN if verifier else name, size=count, verifier=verifier)
    entries, judge = all_entries(task, DataConfig(seed=1, tasks=(task,)))

    def say(prompt: Prompt, sample: int) -> str:
        if verifier:
            return f"{sample} and so on, so the answer is {int(prompt.answer) + sample % 2}."
        return (prompt.answer if sample % 2 else prompt.answer + "1") + " " * sample

    return [(prompt, [say(prompt, sample) for sample in range(SAMPLES)]) for prompt in entries], judge


def rate(name: str, rounds: int = 3) -> float:
    """Completions a second in the best of some rounds."""
    asked, judge = answers(name)
    worker = RewardWorker({name: judge}, RewardsConfig(processes=1))  # type: ignore[dict-item]
    try:
        worker.score_answers(asked[:PROMPTS_A_CALL])
        found = [_once(worker, asked) for _ in range(rounds)]
    finally:
        worker.close()
    return len(asked) * SAMPLES / min(found)


def _once(worker: RewardWorker, asked: Sequence[tuple[Prompt, list[str]]]) -> float:
    began = time.perf_counter()
    for at in range(0, len(asked), PROMPTS_A_CALL):
        worker.score_answers(asked[at : at + PROMPTS_A_CALL])
    return time.perf_counter() - began


if __name__ == "__main__":
    print(json.dumps({name: rate(name) for name in sys.argv[1:]}))
