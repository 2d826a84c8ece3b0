"""How fast verifiers score through a reward actor, beside the same `score_answer` in a plain loop; and what hangs cost.

    python -m benchmarks.rewards
    python -m benchmarks.rewards --against CHECKOUT   # beside another version's reward worker, in turns

Loop and actor take turns, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import tables
from benchmarks.busy import Busy
from cluster.run import actors
from cluster.run.recipe import Recipe
from cluster.run.scoring import AsyncScoringWorker
from learner.engine import free_port
from rewards.config import DataConfig, RewardsConfig, TaskConfig
from rewards.sources import all_entries
from rewards.verify import Verifier
from rollout.types import Completion, Draws, FinishReason, Group, Prompt, Rollout, RouterStamp, Sampling

# A comparison of two strings; GSM8K's exact answer, found in a sentence; symbolic mathematics.
CHEAPEST, CHEAP, EXPENSIVE = "chain_sum", "number", "simple_integration"
BESIDE = ("chain_sum", "leg_counting", "number", "math", "countdown", "simple_integration", "sudoku")
SAMPLES = 8
ROUNDS = 3
LIMIT_S, HANGS = 0.5, 0.01


def entries_of(name: str, count: int) -> tuple[list[Prompt], Verifier]:
    """Prompts of a Reasoning Gym data set and its verifier; for `number`, GSM8K's verifier on some sums."""
    task = TaskConfig(name=name, dataset=CHEAPEST if name == CHEAP else name, size=count, verifier=_verifier(name))
    entries, verifier = all_entries(task, DataConfig(seed=1, tasks=(task,)))
    return [replace(entry, ordinal=index) for index, entry in enumerate(entries)], verifier


def _verifier(name: str) -> str | None:
    return name if name == CHEAP else None


def rollout_of(prompts: Sequence[Prompt], answer: Callable[[int, Prompt], str]) -> Rollout:
    """Groups of completions as a rollout worker would hand them over; every other answer is the gold one."""
    nothing = np.zeros(4, np.int64)

    def completion(text: str) -> Completion:
        return Completion(tokens=nothing, logprobs=np.zeros(4, np.float32), text=text, finish=FinishReason.STOP)

    groups = tuple(
        Group(
            prompt=prompt,
            prompt_tokens=nothing,
            completions=tuple(completion(answer(prompt.ordinal * SAMPLES + n, prompt)) for n in range(SAMPLES)),
            sampling=Sampling(temperature=1.0, max_new_tokens=4, samples=SAMPLES),
            router=RouterStamp(version=0, incarnation=0, checksum=""),
            draws=Draws(expert_mask=np.ones(1, bool)),
            prefix_hash="",
            prefix_sketch=np.zeros(8, np.float32),
            prefix_rms_ratio=0.0,
            feature_keys=("",),
            attention=np.zeros((8, 1), np.float32),
        )
        for prompt in prompts
    )
    return Rollout(groups, tokens=0, hits=0, misses=0, seconds=0.0, encode_s=0.0)


def spelled(number: int, prompt: Prompt) -> str:
    """A short answer to a word problem, as GSM8K's are; see `half_right`."""
    return f"{number % SAMPLES} and so on, so the answer is {int(prompt.answer) + (number % 2)}."


def half_right(number: int, prompt: Prompt) -> str:
    """The gold answer, or one that is nearly it; no two of a prompt alike, because equal ones are judged once."""
    return (prompt.answer if number % 2 else prompt.answer + "1") + " " * (number % SAMPLES)


ANSWERS: dict[str, Callable[[int, Prompt], str]] = {CHEAP: spelled}


def loop_rate(prompts: Sequence[Prompt], verifier: Verifier) -> float:
    """Scores a second in a loop in this process."""
    said = ANSWERS.get(prompts[0].task, half_right)
    answers = [(said(prompt.ordinal * SAMPLES + n, prompt), prompt) for prompt in prompts for n in range(SAMPLES)]
    began = time.perf_counter()
    for text, prompt in answers:
        verifier.score(text, prompt)
    return len(answers) / (time.perf_counter() - began)


def start(verifiers: dict[str, Verifier], workers: int, timeout_s: float = 10.0) -> list[Any]:
    """Reward actors that are warm."""
    config = RewardsConfig(workers=workers, processes=1, timeout_s=timeout_s)
    found = [
        actors.spawn(
            Recipe(f"Reward({i} of {workers}: {', '.join(verifiers)})", AsyncScoringWorker, (verifiers, config, i)),
            concurrency=16,
        )
        for i in range(workers)
    ]
    asyncio.run(_all([worker.call("ready") for worker in found]))
    return found


def actor_rate(workers: Sequence[Any], rollouts: Sequence[Rollout]) -> float:
    """Scores a second through the actors, whose calls overlap as in a run."""
    import ray

    sent = [ray.put(rollout) for rollout in rollouts]
    began = time.perf_counter()
    calls = [workers[i % len(workers)].call("score", part, returns=2)[1] for i, part in enumerate(sent)]
    asyncio.run(_all(calls))
    total = sum(len(group.completions) for rollout in rollouts for group in rollout.groups)
    return total / (time.perf_counter() - began)


async def _all(references: Sequence[Any]) -> None:
    await asyncio.gather(*references)


def compare(name: str, count: int) -> dict[str, Any]:
    """One verifier: a plain loop, one actor, and as many actors as cores."""
    prompts, verifier = entries_of(name, count)
    loop_rate(prompts[:32], verifier)
    said = ANSWERS.get(name, half_right)
    rollouts = [rollout_of(prompts[at : at + 32], said) for at in range(0, count, 32)]
    cores = os.cpu_count() or 1
    one, many = start({name: verifier}, 1), start({name: verifier}, cores)
    for workers in (one, many):
        actor_rate(workers, rollouts[: 2 * cores])
    rounds = [
        (loop_rate(prompts, verifier), actor_rate(one, rollouts), actor_rate(many, rollouts))
        for _ in track(range(ROUNDS), description=name)
    ]
    loops, ones, manys = (median(column) for column in zip(*rounds, strict=True))
    return {
        "loop": loops, "one_actor": ones, "actors": manys, "processes": cores,
        "one_actor_to_loop": median(one / loop for loop, one, _ in rounds),
        "actors_to_one": median(many / one for _, one, many in rounds),
    }  # fmt: skip


def hanging(count: int) -> dict[str, Any]:
    """A verifier of 50 ms that hangs at 1 % of the answers, beside one that never does."""
    prompts = [Prompt(ordinal=n, task="busy", messages=(), answer="") for n in range(count // SAMPLES)]
    workers = start({"busy": Busy()}, 1, LIMIT_S)

    def sometimes(number: int, prompt: Prompt) -> str:
        return "hang" if number % round(1 / HANGS) == 50 else f"work {number}"

    rates: dict[str, list[float]] = {"sound": [], "hangs": []}
    for _ in track(range(ROUNDS), description="hangs"):
        for name, answer in (("sound", lambda number, prompt: f"work {number}"), ("hangs", sometimes)):
            parts = [rollout_of(prompts[at : at + 5], answer) for at in range(0, len(prompts), 5)]
            rates[name].append(actor_rate(workers, parts))
    ratio = median(late / sound for sound, late in zip(rates["sound"], rates["hangs"], strict=True))
    return {"sound": median(rates["sound"]), "hangs": median(rates["hangs"]), "ratio": ratio, "limit_s": LIMIT_S}


def beside(other: Path, rounds: int) -> dict[str, Any]:
    """A reward worker of this checkout and one of another, in turns: rates, and the median of their ratios."""
    here = Path(__file__).parents[1]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in BESIDE}
    for _ in track(range(rounds), description=f"beside {other}"):
        theirs, ours = (_rates(here / "benchmarks" / "reward_rates.py", checkout) for checkout in (other, here))
        for name, pairs in found.items():
            pairs.append((theirs[name], ours[name]))
    return {
        name: {
            "theirs": median(a for a, _ in pairs),
            "ours": median(b for _, b in pairs),
            "ratio": median(b / a for a, b in pairs),
        }
        for name, pairs in found.items()
    }


def _rates(script: Path, checkout: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-P", str(script), *BESIDE]  # beside the script there is another module named rewards
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def render_beside(found: dict[str, Any]) -> Table:
    """What was found beside another checkout."""
    table = Table("verifier", "theirs", "ours", "ours / theirs", title="scores a second through a reward worker")
    for name, row in found.items():
        table.add_row(name, f"{row['theirs']:,.0f}", f"{row['ours']:,.0f}", f"{row['ratio']:.2f}")
    return table


def render(found: dict[str, Any]) -> Table:
    """What was found."""
    table = Table("verifier", "loop", "one actor", "actors", "one / loop", "actors / one", title="scores a second")
    for name in (CHEAPEST, CHEAP, EXPENSIVE):
        row = found[name]
        rates = [f"{row[key]:,.0f}" for key in ("loop", "one_actor", "actors")]
        table.add_row(name, *rates, f"{row['one_actor_to_loop']:.2f}", f"{row['actors_to_one']:.2f}")
    row = found["hanging"]
    table.add_row("hangs at 1 %", "", f"{row['sound']:.1f}, hanging {row['hangs']:.1f}", "", f"{row['ratio']:.2f}", "")
    return table


def main(line: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the results; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1024, help="of the cheap verifiers, with 8 completions each")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--against", type=Path, help="another checkout of this project; measures nothing else")
    parser.add_argument("--rounds", type=int, default=5, help="with --against")
    given, console = parser.parse_args(line), Console()
    if given.against:
        found = beside(given.against, given.rounds)
        console.print(render_beside(found))
        _write(given.results, "rewards-beside", found, console)
        return 0
    actors.join_cluster(None, free_port(), "benchmark")
    try:
        found = {name: compare(name, given.prompts) for name in (CHEAPEST, CHEAP)}
        found[EXPENSIVE] = compare(EXPENSIVE, max(64, given.prompts // 16))
        found["hanging"] = hanging(400)
    finally:
        actors.leave_cluster()
    console.print(render(found))
    _write(given.results, "rewards", found, console)
    return 0


def _write(folder: Path, name: str, found: dict[str, Any], console: Console) -> None:
    machine, today = tables.device(), datetime.datetime.now(datetime.UTC).date().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tables.file_name(today, machine, name)
    path.write_text(
        json.dumps({"date": today, "device": machine, "load": os.getloadavg()[0], **found}, indent=1) + "\n"
    )
    console.print(f"results: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
