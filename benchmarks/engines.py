"""The policy's two engines side by side: seconds to start, and tokens a second, at two model sizes.

    python -m benchmarks.engines
    python -m benchmarks.engines --model /models/Qwen2.5-3B --dtype bfloat16 --gpus 1

Every measurement is a process of its own; the engines take turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import tables
from cluster.run.environment import PROCESS_ENVIRONMENT

ENGINES = ("transformers", "vllm")
ROUNDS, CALLS = 2, 3
SETTINGS = ("dtype", "gpus", "prompts", "prompt_tokens", "samples", "new_tokens")


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a model's folder instead of the two random ones; repeatable")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--gpus", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "ANSWER"), help=argparse.SUPPRESS)
    return parser.parse_args(line)


def measure(given: argparse.Namespace) -> None:
    """One engine in this process; writes what it found."""
    engine, answer = given.one
    began = time.perf_counter()
    import torch

    from experts.loading import load_embeddings, load_frozen
    from rollout.config import PolicyConfig
    from rollout.draws import token_uniforms
    from rollout.engine import PolicyEngine, Request, TransformersEngine
    from rollout.types import Sampling

    longest = given.prompt_tokens + given.new_tokens + 16
    settings = {"model": given.model[0], "engine": engine, "dtype": given.dtype, "gpus": given.gpus}
    if engine == "vllm":
        settings |= {"max_model_tokens": longest} | ({} if given.gpus else {"kv_cache_gb": 1.0})
    config = PolicyConfig.model_validate(settings)
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    made: PolicyEngine
    if engine == "vllm":
        from rollout.vllm import VllmPolicyEngine

        policy = load_embeddings(given.model[0], given.dtype)
        made = VllmPolicyEngine(policy, config, "front", threads)
    else:
        policy = load_frozen(given.model[0], given.dtype, "cuda" if given.gpus else "cpu")
        made = TransformersEngine(policy, "front")
    started = time.perf_counter() - began
    sampling = Sampling(temperature=1.0, max_new_tokens=given.new_tokens, samples=given.samples)
    calls, plain = [], min(90, policy.model.config.vocab_size - 3)
    for call in range(1 + CALLS):
        requests = []
        for row in range(given.prompts):
            uniforms = token_uniforms(call, row, 0, given.samples, given.new_tokens) if made.needs_uniforms else None
            # No two calls share a prompt, so that no prefix cache answers for the model.
            tokens = [3 + (call * 7 + row * 13 + place * place) % plain for place in range(given.prompt_tokens)]
            requests.append(Request(tokens, uniforms, 1000 * call + row))
        start = time.perf_counter()
        groups = made.generate(requests, None, sampling)
        calls.append((time.perf_counter() - start, sum(len(c.tokens) for group in groups for c in group)))
    (first, _), *warm = calls
    made.close()
    result = {"start_s": started, "first_call_s": first, "tokens_per_second": [count / s for s, count in warm]}
    Path(answer).write_text(json.dumps(result))


def compare(model: str, given: argparse.Namespace) -> dict[str, Any]:
    """Both engines on one model, in turns."""
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    options = [part for key in SETTINGS for part in (f"--{key.replace('_', '-')}", str(getattr(given, key)))]
    with tempfile.TemporaryDirectory() as place:
        for _ in range(ROUNDS):
            for engine in ENGINES:
                answer = Path(place) / "answer.json"
                command = [sys.executable, "-m", "benchmarks.engines", "--model", model, *options]
                subprocess.run(
                    [*command, "--one", engine, str(answer)], check=True, env=os.environ | PROCESS_ENVIRONMENT
                )
                found[engine].append(json.loads(answer.read_text()))
    summary = {
        engine: {
            "start_s": median(run["start_s"] for run in runs),
            "first_call_s": median(run["first_call_s"] for run in runs),
            "tokens_per_second": median(rate for run in runs for rate in run["tokens_per_second"]),
        }
        for engine, runs in found.items()
    }
    ratio = summary["vllm"]["tokens_per_second"] / summary["transformers"]["tokens_per_second"]
    return {**summary, "tokens_vllm_to_transformers": ratio}


def main(line: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the results; the exit status."""
    given = arguments(line)
    if given.one:
        measure(given)
        return 0
    console, machine = Console(), tables.device()
    with tempfile.TemporaryDirectory() as place:
        if given.model:
            models = {Path(path).name: path for path in given.model}
        else:
            from benchmarks.random_models import SMALL, TINY, make

            shapes = {"0.6 M parameters": TINY, "35 M parameters": SMALL}
            models = {name: str(make(Path(place) / name.split()[0], shape)) for name, shape in shapes.items()}
        found = {name: compare(path, given) for name, path in track(models.items(), "engines", len(models))}
    table = Table("model", "engine", "start, s", "first call, s", "tokens a second", "vLLM / transformers")
    for name, row in found.items():
        for engine in ENGINES:
            figures = row[engine]
            ratio = f"{row['tokens_vllm_to_transformers']:.2f}" if engine == "vllm" else ""
            start, first = f"{figures['start_s']:.1f}", f"{figures['first_call_s']:.2f}"
            table.add_row(name, engine, start, first, f"{figures['tokens_per_second']:,.0f}", ratio)
    console.print(table)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / tables.file_name(today, machine, "engines")
    settings = {
        key: getattr(given, key) for key in ("dtype", "gpus", "prompts", "prompt_tokens", "samples", "new_tokens")
    }
    path.write_text(
        json.dumps({"date": today, "device": machine, "settings": settings, "models": found}, indent=1) + "\n"
    )
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
