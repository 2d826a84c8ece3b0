"""A step's groups on disk, so that `musketeers replay` can recompute its loss and gradient exactly."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.types import (
    Completion,
    Draws,
    FinishReason,
    Group,
    Prompt,
    RouterStamp,
    Sampling,
    Score,
    distinct_objects,
)


def path_of(folder: Path, step: int) -> Path:
    """Where a step's groups are."""
    return folder / f"step-{step:06d}.jsonl.gz"


def write(folder: Path, step: int, groups: Sequence[Group]) -> None:
    """Writes the groups of a step, whole or not at all."""
    folder.mkdir(exist_ok=True)
    partial = folder / ".partial"
    write_file(partial, groups)
    partial.replace(path_of(folder, step))


def write_file(path: Path, groups: Sequence[Group]) -> None:
    """Writes one JSON object a group; prompts are named by ordinal, the stream makes them again."""
    lines = "".join(json.dumps(_pack(group), separators=(",", ":")) + "\n" for group in groups)
    path.write_bytes(gzip.compress(lines.encode(), compresslevel=1, mtime=0))


def read(folder: Path, step: int, prompt: Callable[[int, int | None], Prompt]) -> list[Group]:
    """The groups of a step.

    Args:
        prompt: makes the prompt of an ordinal and a curriculum's level (the run's stream).
    """
    return read_file(path_of(folder, step), prompt)


def read_file(path: Path, prompt: Callable[[int, int | None], Prompt]) -> list[Group]:
    """What `write_file` wrote."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return [_unpack(json.loads(line), prompt) for line in lines]


def _pack(group: Group) -> dict[str, Any]:
    distinct, said = distinct_objects(group.completions)
    return {
        "ordinal": group.ordinal,
        "task": group.prompt.task,
        "level": _level(group.prompt),
        "prompt_tokens": group.prompt_tokens.tolist(),
        "completions": [
            {"tokens": c.tokens.tolist(), "logprobs": c.logprobs.tolist(), "text": c.text, "finish": c.finish}
            for c in distinct
        ],
        "samples": said,  # places among the completions, which are distinct
        "sampling": [
            group.sampling.temperature,
            group.sampling.max_new_tokens,
            group.sampling.samples,
            *group.sampling.stop,
        ],
        "router": [group.router.version, group.router.incarnation, group.router.checksum],
        "expert_mask": group.draws.expert_mask.tolist(),
        "choice": [group.draws.choice, group.draws.choice_logprob, group.draws.open],
        "prefix_hash": group.prefix_hash,
        "prefix_sketch": group.prefix_sketch.tolist(),
        "prefix_rms_ratio": group.prefix_rms_ratio,
        "feature_keys": group.feature_keys,
        "attention": group.attention.tolist(),
        "scores": [score.row() for score in group.scores],
    }


def _level(prompt: Prompt) -> int | None:
    """The curriculum's, if it is one: under that key a plug-in may have anything."""
    level = prompt.payload.get("level")
    return level if isinstance(level, int) else None


def _draws(packed: dict[str, Any]) -> Draws:
    choice, logprob, is_open = packed.get("choice", (-1, 0.0, True))
    mask = np.array(packed["expert_mask"], dtype=bool)
    return Draws(expert_mask=mask, choice=choice, choice_logprob=logprob, open=is_open)


def _unpack(packed: dict[str, Any], prompt: Callable[[int, int | None], Prompt]) -> Group:
    temperature, max_new_tokens, samples, *stop = packed["sampling"]
    version, incarnation, checksum = packed["router"]
    distinct = [
        Completion(
            tokens=np.array(c["tokens"], dtype=np.int64),
            logprobs=np.array(c["logprobs"], dtype=np.float32),
            text=c["text"],
            finish=FinishReason(c["finish"]),
        )
        for c in packed["completions"]
    ]
    return Group(
        prompt=prompt(packed["ordinal"], packed["level"]),
        prompt_tokens=np.array(packed["prompt_tokens"], dtype=np.int64),
        completions=tuple(distinct[place] for place in packed["samples"]),
        sampling=Sampling(temperature=temperature, max_new_tokens=max_new_tokens, samples=samples, stop=tuple(stop)),
        router=RouterStamp(version=version, incarnation=incarnation, checksum=checksum),
        draws=_draws(packed),
        prefix_hash=packed["prefix_hash"],
        prefix_sketch=np.array(packed["prefix_sketch"], dtype=np.float32),
        prefix_rms_ratio=packed["prefix_rms_ratio"],
        feature_keys=tuple(packed["feature_keys"]),
        attention=np.array(packed["attention"], dtype=np.float32),
        scores=tuple(Score.from_row(row) for row in packed["scores"]),
    )
