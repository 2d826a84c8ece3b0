"""Frozen baselines on disk: training cannot change them, so equal models on equal prompts are measured once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster.config import RunConfig
from cluster.watch.results import Result
from rewards.sources import Task
from rollout.types import Prompt

FORMAT = 4  # rises when the baselines themselves are measured in another way
MEASURED_BY = ("torch", "transformers", "reasoning-gym", "scikit-learn", "math-verify", "latex2sympy2-extended")


class KnownBaselines:
    """A folder of evaluations, each under the fingerprint of everything that it depends on.

    models: fingerprint of every expert, in order, and of the policy.
    """

    def __init__(self, config: RunConfig, tasks: Mapping[str, Task], models: Sequence[str]) -> None:
        self._config, self._tasks, self._models = config, tasks, models
        self._folder = Path(config.evaluation.cache).expanduser() if config.evaluation.cache else None

    def path(self, prompts: Sequence[Prompt], examples: Sequence[Prompt]) -> Path | None:
        """Where the evaluation on these prompts lies, or will.

        examples: what the route-and-answer classifier learns from.

        Returns None where nothing is kept: without a folder, with code of the user's own, which no fingerprint covers,
        and where a late verifier counts as a wrong answer.
        """
        c = self._config
        if self._folder is None or c.rewards.on_timeout == "zero" or any(map(_has_own_code, self._tasks.values())):
            return None
        settings = {
            "format": FORMAT,
            "versions": {name: version(name) for name in MEASURED_BY},
            "models": list(self._models),
            "experts": [expert.name for expert in c.experts],
            "policy_dtype": c.policy.dtype,
            "max_new_tokens": c.sampling.max_new_tokens,
            "stop": c.sampling.stop,
            "text": c.router.text.model_dump(mode="json"),
            "rewards": c.rewards.model_dump(mode="json", exclude={"workers", "processes"}),
            "tasks": {n: task.config.model_dump(mode="json", exclude={"weight"}) for n, task in self._tasks.items()},
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for line in _lines([prompts, examples]):
            digest.update(line)
        return self._folder / f"{digest.hexdigest()[:32]}.json"

    def read(self, path: Path | None) -> dict[str, Result] | None:
        """The evaluation at this place; None when there is none, or none that can be read."""
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path is not None else None
        except (OSError, ValueError):
            return None

    def write(self, path: Path | None, evaluation: Mapping[str, Result]) -> None:
        """Keeps an evaluation, if it has a place that can be written: a run does not depend on it."""
        if path is None:
            return
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(f".{os.getpid()}.tmp")
            unfinished.write_text(json.dumps(dict(evaluation)), encoding="utf-8")
            unfinished.replace(path)


def fingerprints(experts: Iterable[Mapping[str, Any]], policy: Mapping[str, Any]) -> list[str]:
    """Of the models, from what their workers say of them, and of those that print a date."""
    return [str(info["fingerprint"]) + str(info.get("date", "")) for info in (*experts, policy)]


def _has_own_code(task: Task) -> bool:
    named = [task.config.verifier or "", *(term.kind for term in task.config.rewards)]
    return task.config.plugin is not None or any(":" in name for name in named)


def _lines(pools: Iterable[Sequence[Prompt]]) -> Iterable[bytes]:
    for pool in pools:
        yield f"\n{len(pool)} prompts\n".encode()
        for prompt in pool:
            yield json.dumps([prompt.task, prompt.messages, prompt.answer]).encode()
