"""Some of a run's last training prompts with what was answered to them, for people."""

from __future__ import annotations

from typing import Any

import torch

from cluster.config import RunConfig
from cluster.run import groups
from cluster.run.asked import answer_tokens
from cluster.run.fleet import Fleet
from cluster.run.folder import RunFolder
from experts.expert import whole
from learner.advantages import has_signal
from learner.algorithms import build_algorithm
from rewards.stream import PromptStream
from rollout.types import Group, Prompt, RewardStatus

A_TASK = 2  # examples


async def examples(
    config: RunConfig, fleet: Fleet, stream: PromptStream, folder: RunFolder, step: int
) -> list[dict[str, Any]]:
    """For `samples.json`: per task some groups of the last step, those that taught something first.

    Empty where the run keeps no groups.  Experts on vLLM, which would have to change engines for it, are not asked.
    """
    if not groups.path_of(folder.groups, step).is_file():
        return []
    kept = groups.read(folder.groups, step, stream.prompt)
    by_task: dict[str, list[Group]] = {}
    for group in sorted(kept, key=lambda g: not has_signal(*_verdicts(g))):
        by_task.setdefault(group.prompt.task, []).append(group)
    chosen = [group for mine in by_task.values() for group in mine[:A_TASK]]
    prompts = [group.prompt for group in chosen]
    words = await _words(config, fleet, prompts)
    return [_example(config, group, said) for group, said in zip(chosen, words, strict=True)]


async def _words(config: RunConfig, fleet: Fleet, prompts: list[Prompt]) -> list[dict[str, str]]:
    """Every expert's own answer to each prompt."""
    if any(expert.engine != "transformers" for expert in config.experts):
        return [{} for _ in prompts]
    stages = fleet.answers(prompts, answer_tokens(config))
    said = whole(await fleet.get_all([s.reference for s in stages], "the experts' words", stages=stages))
    return [{each.expert: each.answers[row] for each in said} for row in range(len(prompts))]


def _example(config: RunConfig, group: Group, words: dict[str, str]) -> dict[str, Any]:
    rewards, statuses = _verdicts(group)
    ok = torch.tensor([[status is RewardStatus.OK for status in statuses]])
    algorithm = build_algorithm(config.algorithm)
    # One of the user's own need not have any.
    advantages: list[float | None] = [None] * len(rewards)
    if hasattr(algorithm, "advantages"):
        advantages = algorithm.advantages(torch.tensor([rewards]).nan_to_num(), ok)[0].tolist()
    answers: dict[str, dict[str, Any]] = {}
    for completion, score, advantage in zip(group.completions, group.scores, advantages, strict=True):
        mine = {"text": completion.text, "count": 0, "status": score.status.value, "advantage": advantage}
        answers.setdefault(completion.text, mine | {"reward": score.reward})["count"] += 1
    shares = group.attention.mean(axis=0).tolist() if group.attention.size else []
    return {
        "task": group.prompt.task,
        "ordinal": group.ordinal,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "experts": words,
        "attention": dict(zip([expert.name for expert in config.experts], shares, strict=False)),
        "prefix": group.draws.open,
        "answers": sorted(answers.values(), key=lambda mine: -mine["count"]),
    }


def _verdicts(group: Group) -> tuple[list[float], list[RewardStatus]]:
    return [score.reward for score in group.scores], [score.status for score in group.scores]
