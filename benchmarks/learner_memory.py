"""Peak memory and time of the policy's part of one learner update: whole logits against chunks, and checkpointing.

    python -m benchmarks.learner_memory
    python -m benchmarks.learner_memory --limit-gb 8 --parts vocabulary

Every measurement is a process of its own on the CPU; the ways take turns.  Peaks are over what the loaded model takes.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import tables
from cluster.run.environment import PROCESS_ENVIRONMENT

MIB, GIB = 2**20, 2**30
VOCABULARIES, TOKENS = (32_768, 151_936, 262_144), (512, 1024, 2048, 4096, 8192)
FEW_WORDS = 512  # a vocabulary whose logits weigh nothing
DEPTHS = (4, 8, 16, 32)
GROUPS, SAMPLES, PROMPT, SLOTS = 4, 8, 32, 4
COPIES = 7  # of (tokens, vocabulary) in float32, at most, before the first measurement says how many
# Of the C library: what is freed goes back at once, instead of to a heap whose holes would count as in use.
EVERY_TENSOR_OF_ITS_OWN = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
PARTS = ("vocabulary", "gradient", "head", "depth", "layer")


@dataclass(frozen=True)
class Case:
    """One measurement.

    how: `whole` logits as before, `chunks`, or `recomputed` (torch's checkpointing of each chunk instead).
    tokens: of completions.
    """

    how: str = "chunks"
    vocabulary: int = FEW_WORDS
    tokens: int = 2048
    layers: int = 2
    width: int = 256
    feedforward: int = 768
    heads: int = 4
    dtype: str = "float32"
    checkpoint: bool = False
    rounds: int = 2
    threads: int = 1

    @property
    def padded(self) -> int:
        """Tokens that the policy sees: prefixes, prompts and completions."""
        return GROUPS * (SLOTS + PROMPT) + self.tokens

    @property
    def logits(self) -> int:
        """Bytes of one copy of all logits in float32."""
        return 4 * self.tokens * self.vocabulary


def whole_logprobs(
    policy: Any, prompts: Any, prefix: Any, completions: Any, temperature: float, _checkpoint: bool = False
) -> Any:
    """`completion_logprobs` as it was: all logits at once, in float32."""
    import torch

    from experts.kv_cache import fewest_columns, new_cache, select_rows
    from learner.logprobs import distinct_rows
    from learner.token_logprobs import TokenStatistics
    from rollout.sequence import with_prefix

    rows, inverse = distinct_rows(completions, len(prompts.tokens))
    group = rows // (len(completions.tokens) // len(prompts.tokens))
    tokens, cache = completions.tokens[rows], new_cache(policy.model.config)
    out = policy.model(
        **policy.inputs(prompts.tokens, with_prefix(policy.embed(prompts.tokens), prefix, prompts)),
        attention_mask=prompts.mask,
        position_ids=prompts.positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits, given = out.logits[group], tokens.shape[1] - 1
    if given:
        select_rows(cache, group)
        read = max(given, fewest_columns(cache))
        out = policy.model(
            input_ids=tokens[:, :read],
            attention_mask=completions.mask[rows, : prompts.mask.shape[1] + read],
            position_ids=completions.positions[rows, :read],
            past_key_values=cache,
            use_cache=True,
        )
        logits = torch.cat([logits, out.logits[:, :given]], dim=1)
    raised = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = (raised / temperature).log_softmax(dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return TokenStatistics(logprobs.gather(2, tokens[:, :, None])[:, :, 0][inverse], entropy[inverse])


def random_policy(case: Case) -> Any:
    """A frozen Qwen2 of the case's shape."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from experts.loading import FrozenModel

    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=2,
        intermediate_size=case.feedforward,
        tie_word_embeddings=True,
        initializer_range=1 / case.width**0.5,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).requires_grad_(False).eval().to(getattr(torch, case.dtype))
    return FrozenModel("", "random", model, None, (1,), 0)


def random_groups(case: Case, tokens: int) -> list[Any]:
    """Groups of completions of equal length, `tokens` of them together, no two alike."""
    from rollout.types import Completion, Draws, FinishReason, Group, Prompt, RouterStamp, Sampling, Score

    rng, length = np.random.default_rng(0), tokens // (GROUPS * SAMPLES)

    def completion() -> Completion:
        said = rng.integers(2, case.vocabulary, length)
        chance = np.full(length, -np.log(case.vocabulary), np.float32)
        return Completion(tokens=said, logprobs=chance, text="", finish=FinishReason.LENGTH)

    return [
        Group(
            prompt=Prompt(ordinal=n, task="t", messages=({"role": "user", "content": ""},), answer=""),
            prompt_tokens=rng.integers(2, case.vocabulary, PROMPT),
            completions=tuple(completion() for _ in range(SAMPLES)),
            sampling=Sampling(temperature=1.0, max_new_tokens=length, samples=SAMPLES),
            router=RouterStamp(version=0, incarnation=0, checksum=""),
            draws=Draws(expert_mask=np.ones(1, bool)),
            prefix_hash="",
            prefix_sketch=np.zeros(SLOTS, np.float32),
            prefix_rms_ratio=1.0,
            feature_keys=("",),
            attention=np.ones((SLOTS, 1), np.float32),
            scores=tuple(Score(reward=float(i % 3)) for i in range(SAMPLES)),
        )
        for n in range(GROUPS)
    ]


def measure(case: Case, gradient_file: Path) -> dict[str, float]:
    """One case in this process; the prefix's gradient goes into a file."""
    import torch

    import learner.gradient
    import learner.logprobs
    from learner.algorithms import build_algorithm
    from learner.batch import global_denominators
    from learner.config import AlgorithmConfig, KLConfig
    from learner.gradient import PrefixGradient
    from learner.token_logprobs import token_statistics

    torch.set_num_threads(case.threads)
    if case.how == "whole":
        learner.gradient.completion_logprobs = whole_logprobs
    elif case.how == "recomputed":
        learner.logprobs.token_statistics = lambda *given: token_statistics(*given[:5], True)
    policy = random_policy(case)
    of = PrefixGradient(
        policy, build_algorithm(AlgorithmConfig()), "front", 10**9, KLConfig(), checkpoint_activations=case.checkpoint
    )
    prefix = torch.randn(GROUPS, SLOTS, case.width, generator=torch.Generator().manual_seed(1))

    def update(tokens: int) -> torch.Tensor:
        groups = random_groups(case, tokens)
        return of(groups, prefix, None, None, global_denominators(groups, None))[0]

    update(2 * GROUPS * SAMPLES)
    found: dict[str, list[float]] = {"seconds": [], "cpu_s": [], "peak_mib": []}
    for _ in range(case.rounds):
        reset_peak()
        before, began, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
        gradient = update(case.tokens)
        found["seconds"].append(time.perf_counter() - began)
        found["cpu_s"].append(time.process_time() - cpu)
        found["peak_mib"].append((resident("VmHWM") - before) / MIB)
    np.save(gradient_file, gradient.double().numpy())
    # What the allocator keeps after the first round hides in the second one's start.
    return {"seconds": min(found["seconds"]), "cpu_s": min(found["cpu_s"]), "peak_mib": max(found["peak_mib"])}


def reset_peak() -> None:
    """The process's peak is its present size again (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(which: str) -> int:
    """Bytes of memory, now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


class Runs:
    """Runs cases in processes of their own, each once.

    limit: bytes; a case that is expected to take more is not run.
    """

    def __init__(self, limit: float, threads: int, console: Console) -> None:
        self.limit, self.threads, self.console = limit, threads, console
        self.folder = tempfile.TemporaryDirectory()
        self.found: dict[Case, dict[str, float]] = {}

    def __call__(self, case: Case) -> dict[str, float]:
        case = replace(case, threads=self.threads)
        if case not in self.found:
            command = [sys.executable, "-m", "benchmarks.learner_memory", "--one", json.dumps(asdict(case))]
            command.append(str(self.gradient_file(case)))
            env = os.environ | PROCESS_ENVIRONMENT | {"OMP_NUM_THREADS": str(self.threads)} | EVERY_TENSOR_OF_ITS_OWN
            out = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
            self.found[case] = json.loads(out.splitlines()[-1])
            self.console.print(
                f"{case.how} {case.vocabulary} {case.tokens} {case.layers}: {out.strip()}", style="dim", soft_wrap=True
            )
        return self.found[case]

    def gradient_file(self, case: Case) -> Path:
        """Where the prefix's gradient of a case is."""
        return Path(self.folder.name) / f"{hash(replace(case, threads=self.threads)):x}.npy"

    def difference(self, one: Case, other: Case) -> float:
        """Of two cases' gradients, relative."""
        mine, theirs = np.load(self.gradient_file(one)), np.load(self.gradient_file(other))
        return float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))


def vocabulary_rows(runs: Runs, vocabularies: Sequence[int], tokens: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Both ways at every size; `beyond` is what comes on top of the same policy with hardly any words, in MiB."""
    copies = float(COPIES)
    for vocabulary in vocabularies:
        for count in tokens:
            floor = runs(Case(tokens=count))["peak_mib"]
            new = Case("chunks", vocabulary, count)
            old = replace(new, how="whole")
            row: dict[str, Any] = {"vocabulary": vocabulary, "tokens": count, "chunks": dict(runs(new))}
            expected = floor + copies * old.logits / MIB
            if expected * MIB <= runs.limit:
                row["whole"], row["difference"] = dict(runs(old)), runs.difference(new, old)
                copies = (row["whole"]["peak_mib"] - floor) * MIB / old.logits
            else:
                row["whole"] = {"peak_mib": expected}
            row["extrapolated"] = "difference" not in row
            for how in ("chunks", "whole"):
                row[how]["beyond_mib"] = row[how]["peak_mib"] - floor
            yield row


def gradient_rows(runs: Runs) -> Iterator[dict[str, Any]]:
    """How far a prefix's gradient is from that of whole logits in float64, which tells a fault from rounding."""
    exact = Case("whole", VOCABULARIES[1], 512, dtype="float64", rounds=1)
    cases = [replace(exact, how=how, dtype=dtype) for dtype in ("float64", "float32") for how in ("chunks", "whole")]
    for case in (exact, *cases):
        runs(case)
    for case in cases:
        yield {"how": case.how, "dtype": case.dtype, "difference": runs.difference(case, exact)}


def head_rows(runs: Runs) -> Iterator[dict[str, Any]]:
    """The own function against torch's checkpointing of each chunk."""
    for how in ("chunks", "recomputed"):
        yield {"how": how, **runs(Case(how, VOCABULARIES[1], 1024))}


def depth_rows(runs: Runs) -> Iterator[dict[str, Any]]:
    """With and without checkpointing of the activations."""
    for layers in DEPTHS:
        plain = Case(layers=layers)
        saving = replace(plain, checkpoint=True)
        row = {"layers": layers, "plain": runs(plain), "checkpointed": runs(saving)}
        yield row | {"difference": runs.difference(saving, plain)}


def layer_rows(runs: Runs) -> Iterator[dict[str, Any]]:
    """Bytes of one layer of Qwen2.5-3B for each token, in bfloat16: what two layers more add to the peak."""
    for checkpoint in (False, True):
        shape = Case(tokens=512, width=2048, feedforward=11_008, heads=16, dtype="bfloat16", rounds=1)
        some = replace(shape, checkpoint=checkpoint, layers=2)
        more = replace(some, layers=4)
        added = (runs(more)["peak_mib"] - runs(some)["peak_mib"]) * MIB
        yield {"checkpoint": checkpoint, "bytes_a_token_and_layer": added / 2 / some.padded}


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-gb", type=float, default=20.0, help="cases that would take more are extrapolated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "GRADIENT"), help=argparse.SUPPRESS)
    return parser.parse_args(line)


def shown(found: dict[str, list[dict[str, Any]]]) -> Iterator[Table]:
    """The parts as tables."""
    if rows := found.get("vocabulary"):
        table = Table("words", "tokens", "whole, MiB", "chunks, MiB", "beyond", "ratio", "CPU s", "ratio", "gradients")
        for row in rows:
            old, new, mark = row["whole"], row["chunks"], "*" if row["extrapolated"] else ""
            times = ["", "", ""]
            if not mark:
                ratio = new["cpu_s"] / old["cpu_s"]
                times = [f"{old['cpu_s']:.1f} / {new['cpu_s']:.1f}", f"{ratio:.2f}", f"{row['difference']:.1e}"]
            beyond = f"{old['beyond_mib']:,.0f}{mark} / {new['beyond_mib']:,.0f}"
            ratio_of_peaks = f"{old['peak_mib'] / new['peak_mib']:.1f}{mark}"
            peaks = [f"{old['peak_mib']:,.0f}{mark}", f"{new['peak_mib']:,.0f}", beyond, ratio_of_peaks]
            table.add_row(f"{row['vocabulary']:,}", f"{row['tokens']:,}", *peaks, *times)
        yield table
    if rows := found.get("gradient"):
        table = Table("gradient", "dtype", "from whole logits in float64")
        for row in rows:
            table.add_row(row["how"], row["dtype"], f"{row['difference']:.1e}")
        yield table
    if rows := found.get("head"):
        table = Table("head", "peak, MiB", "CPU s")
        for row in rows:
            table.add_row(row["how"], f"{row['peak_mib']:,.0f}", f"{row['cpu_s']:.1f}")
        yield table
    if rows := found.get("depth"):
        table = Table("layers", "all kept, MiB", "checkpointed, MiB", "CPU s", "ratio", "gradients")
        for row in rows:
            old, new = row["plain"], row["checkpointed"]
            cells = [f"{old['peak_mib']:,.0f}", f"{new['peak_mib']:,.0f}", f"{old['cpu_s']:.1f} / {new['cpu_s']:.1f}"]
            table.add_row(str(row["layers"]), *cells, f"{new['cpu_s'] / old['cpu_s']:.2f}", f"{row['difference']:.1e}")
        yield table
    if rows := found.get("layer"):
        table = Table("a layer of Qwen2.5-3B", "bytes a token")
        for row in rows:
            name = "checkpointed" if row["checkpoint"] else "all kept"
            table.add_row(name, f"{row['bytes_a_token_and_layer']:,.0f}")
        yield table


def main(line: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, writes the results; the exit status."""
    given = arguments(line)
    if given.one:
        print(json.dumps(measure(Case(**json.loads(given.one[0])), Path(given.one[1]))))
        return 0
    console, machine = Console(), tables.device()
    runs = Runs(given.limit_gb * 1e9, given.threads, console)
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "vocabulary": lambda: vocabulary_rows(runs, given.vocabularies, given.tokens),
        "gradient": lambda: gradient_rows(runs),
        "head": lambda: head_rows(runs),
        "depth": lambda: depth_rows(runs),
        "layer": lambda: layer_rows(runs),
    }
    found = {name: list(parts[name]()) for name in given.parts}
    for table in shown(found):
        console.print(table)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / tables.file_name(today, machine, "learner-memory")
    settings = {"limit_gb": given.limit_gb, "threads": given.threads}
    path.write_text(json.dumps({"date": today, "device": machine, "settings": settings, **found}, indent=1) + "\n")
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
