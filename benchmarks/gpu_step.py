"""One whole training step at the paper's shape on one device, split by stage, against what the device can do.

    python -m benchmarks.gpu_step                 # a 3B policy, two 1.5B experts, bfloat16, on a GPU
    python -m benchmarks.gpu_step --shape small   # the same code at a small shape, on a CPU too

Needs torch, transformers and deepspeed, neither Ray nor vLLM: experts, rollout worker and learner rank are the ones of
every run, called one after the other.  Weights are random.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import tables
from benchmarks.random_models import LARGE, LARGER, SMALL, TINY, Shape, make
from experts.config import CacheConfig, ExpertConfig, RouterConfig
from experts.expert import Encoded, Expert
from experts.state import RouterShape
from learner.config import AlgorithmConfig, LearnerConfig
from learner.engine import Rendezvous
from learner.learner import LearnerRank, LearnerSpec
from rollout.config import PolicyConfig
from rollout.types import Group, Prompt, Rollout, Sampling, Score
from rollout.worker import RolloutWorker

STEPS = 3


@dataclass(frozen=True)
class Job:
    """A step's shape.  The full one is the paper's; 32 prompts of 200 tokens, 8 samples of 128, 8 latents."""

    policy: Shape
    expert: Shape
    dtype: str
    prompts: int
    prompt_tokens: int
    samples: int
    new_tokens: int
    latents: int
    router_width: int
    microbatch_tokens: int


JOBS = {
    "paper": Job(LARGER, LARGE, "bfloat16", 32, 200, 8, 128, 8, 512, 16_384),
    "small": Job(SMALL, TINY, "float32", 4, 50, 4, 16, 8, 128, 2048),
    "tiny": Job(TINY, TINY, "float32", 2, 12, 2, 4, 4, 64, 256),
}


class Clock:
    """Seconds by stage; waits for the device before it looks."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, dict[str, list[float]]()

    def time(self, stage: str, work: Callable[[], Any]) -> Any:
        """Does the work, and notes how long it took."""
        self._settle()
        began = time.perf_counter()
        result = work()
        self._settle()
        self.seconds.setdefault(stage, []).append(time.perf_counter() - began)
        return result

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def abilities(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What the device reaches: matrix products in FLOP a second, and copying in bytes a second."""
    size, clock = (8192 if device == "cuda" else 1024), Clock(device)
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    block = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    for stage, work in (("product", lambda: one @ other), ("copy", block.clone)):
        work()
        for _ in range(10):
            clock.time(stage, work)
    return {
        "flop_per_second": 2 * size**3 / median(clock.seconds["product"]),
        "bytes_per_second": 2 * block.numel() / median(clock.seconds["copy"]),
    }


def build(job: Job, device: str, place: Path) -> tuple[list[Expert], RolloutWorker, LearnerRank]:
    """The workers of a run, in this process."""
    gpus = 1.0 if device == "cuda" else 0.0
    folders = [make(place / name, job.expert, job.dtype, seed, device) for seed, name in enumerate(("one", "two"))]
    policy_folder = str(make(place / "policy", job.policy, job.dtype, 2, device))
    common = {"dtype": job.dtype, "gpus": gpus}
    experts = [
        Expert(
            ExpertConfig.model_validate({"name": folder.name, "model": str(folder), "batch": job.prompts, **common}),
            str(folder),
            CacheConfig(memory_mb=0),
        )
        for folder in folders
    ]
    router = RouterConfig(width=job.router_width, latents=job.latents)
    worker = RolloutWorker(PolicyConfig(model=policy_folder, **common), policy_folder, router, seed=0)
    infos, policy = [expert.info() for expert in experts], worker.info()
    shape = RouterShape(
        tuple(info["name"] for info in infos),
        tuple(info["width"] for info in infos),
        (-1, -1),
        tuple(info["fingerprint"] for info in infos),
        policy["width"],
        policy["fingerprint"],
        policy["embedding_rms"],
    )
    worker.attach(shape)
    spec = LearnerSpec(
        learner=LearnerConfig(groups=job.prompts, microbatch_tokens=job.microbatch_tokens, gpus=gpus),
        algorithm=AlgorithmConfig(),
        router=router,
        policy_path=policy_folder,
        policy_dtype=job.dtype,
        shape=shape,
        seed=0,
        max_staleness=0,
        steps=100,
    )
    return experts, worker, LearnerRank(spec, Rendezvous())


def prompts_of(job: Job, step: int) -> list[Prompt]:
    """Prompts of the job's length, other ones in every step."""
    texts = [f"{step} {row} ".ljust(job.prompt_tokens, "x") for row in range(job.prompts)]
    return [
        Prompt(ordinal=step * job.prompts + row, task="t", messages=({"role": "user", "content": text},), answer="")
        for row, text in enumerate(texts)
    ]


def scored(rollout: Rollout) -> Rollout:
    """With rewards that differ in every group, so that every group teaches."""

    def rewards(group: Group) -> list[Score]:
        return [Score(reward=float(sample % 2)) for sample in range(len(group.completions))]

    return rollout.with_groups([group.scored(tuple(rewards(group))) for group in rollout.groups])


def run(job: Job, device: str) -> dict[str, Any]:
    """Some steps; seconds by stage, peak memory, and the shares of what the device can do."""
    able = abilities(device, getattr(torch, job.dtype))
    clock = Clock(device)
    sampling = Sampling(temperature=1.0, max_new_tokens=job.new_tokens, samples=job.samples)
    with tempfile.TemporaryDirectory() as place:
        experts, worker, learner = build(job, device, Path(place))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for step in track(range(1 + STEPS), "steps"):
            some = prompts_of(job, step)
            encoded: list[Encoded] = clock.time(
                "encode", lambda some=some: [expert.encode([p.messages for p in some]) for expert in experts]
            )
            snapshot = learner.snapshot()
            rollout = clock.time("rollout", lambda s=some, r=snapshot, e=encoded: worker.generate(s, sampling, r, *e))
            judged = scored(rollout)
            clock.time("learner", lambda s=some, j=judged, e=encoded: learner.update([p.ordinal for p in s], j, *e))
        parameters = {
            "expert": experts[0].frozen.parameters,
            "policy": worker.policy.parameters,
            "router": learner.trainable()["router"],
        }
    seconds = {stage: median(times[1:]) for stage, times in clock.seconds.items()}
    return {
        "seconds": seconds | {"step": sum(seconds.values())},
        "abilities": able,
        "shares": shares(job, parameters, seconds, able),
        "parameters": parameters,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def shares(
    job: Job, parameters: dict[str, int], seconds: dict[str, float], able: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Of each stage: its products' share of the matrix rate, and its reading of weights as a share of the bandwidth.

    Two FLOP a parameter and token forwards; backwards through a frozen model as many again.  A rollout reads the
    weights once for the prompts and once a new token.
    """
    size = torch.empty(0, dtype=getattr(torch, job.dtype)).element_size()
    prompt = job.prompts * (job.prompt_tokens + job.latents)
    answers = job.prompts * job.samples * job.new_tokens
    policy, expert = parameters["policy"], parameters["expert"]
    passes = 3 if AlgorithmConfig().kl.coefficient else 2  # policy forwards and back, and the KL's reference
    flop = {
        "encode": 2 * 2 * expert * job.prompts * job.prompt_tokens,
        "rollout": 2 * policy * (prompt + answers),
        "learner": passes * 2 * policy * (prompt + answers),
    }
    read = {"encode": 2 * expert * size, "rollout": policy * size * (1 + job.new_tokens), "learner": 0.0}
    return {
        stage: {
            "of_matrix_rate": flop[stage] / seconds[stage] / able["flop_per_second"],
            "of_bandwidth": read[stage] / seconds[stage] / able["bytes_per_second"],
        }
        for stage in flop
    }


def render(found: dict[str, Any]) -> Table:
    """What was found."""
    table = Table("stage", "seconds", "of the matrix rate", "of the bandwidth", title="one training step")
    for stage, share in found["shares"].items():
        values = (share["of_matrix_rate"], share["of_bandwidth"])
        table.add_row(stage, f"{found['seconds'][stage]:.3f}", *(f"{100 * value:.1f} %" for value in values))
    table.add_row("step", f"{found['seconds']['step']:.3f}", "", "")
    able = found["abilities"]
    rates = f"{able['flop_per_second'] / 1e12:.1f} TFLOP/s", f"{able['bytes_per_second'] / 1e9:.0f} GB/s"
    table.add_row("the device", "", *rates, end_section=True)
    if found["peak_memory_bytes"]:
        table.add_row("peak memory", f"{found['peak_memory_bytes'] / 2**30:.1f} GiB", "", "")
    return table


def main(line: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the results; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(JOBS), default="paper")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--microbatch-tokens", type=int, help="of the learner, instead of the shape's own")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    given, console = parser.parse_args(line), Console()
    job = JOBS[given.shape]
    if given.shape == "paper" and given.device == "cpu":
        parser.error("the paper's shape needs a GPU: take --shape small")
    if given.microbatch_tokens:
        job = Job(**{**vars(job), "microbatch_tokens": given.microbatch_tokens})
    found = run(job, given.device)
    console.print(render(found))
    machine = tables.device()
    if given.device == "cuda":
        machine |= {"cpu": torch.cuda.get_device_name(), "host": machine["cpu"]}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / tables.file_name(today, machine, f"gpu-step-{given.shape}")
    results = {"date": today, "device": machine, "torch": torch.__version__, "shape": given.shape, **found}
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
