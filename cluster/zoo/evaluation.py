"""How well the models of a world answer held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.zoo.corpus import own_answer
from cluster.zoo.hints import Hints
from cluster.zoo.models import greedy
from cluster.zoo.recipe import ExpertRecipe
from rewards.sources import Task
from rollout.types import Prompt

Accuracy = dict[str, float]


def expert_accuracy(
    model: Any, tokenizer: Any, tasks: Mapping[str, Task], recipe: ExpertRecipe, limit: int
) -> Accuracy:
    """Share of test prompts, per task of its mixture, to which an expert answers its own part exactly."""
    found: Accuracy = {}
    for name in recipe.mixture:
        prompts = tasks[name].test[:limit]
        answers = greedy(model, tokenizer, _tokens(tokenizer, prompts))
        found[name] = _mean([a == own_answer(p, recipe.task) for a, p in zip(answers, prompts, strict=True)])
    return found


def policy_accuracy(
    model: Any, tokenizer: Any, tasks: Mapping[str, Task], hints: Hints, limit: int
) -> dict[str, Accuracy]:
    """Share of test prompts that the policy answers correctly: `no_hint`, and with the `right_hint` in its slots."""
    found: dict[str, Accuracy] = {"no_hint": {}, "right_hint": {}}
    for name, task in tasks.items():
        prompts = task.test[:limit]
        ids = _tokens(tokenizer, prompts)
        right = [hints.right(prompt) for prompt in prompts]
        found["no_hint"][name] = _scored(task, prompts, greedy(model, tokenizer, ids))
        found["right_hint"][name] = _scored(task, prompts, greedy(model, tokenizer, ids, right))
    return found


def collaboration_accuracy(
    policy: tuple[Any, Any],
    experts: Mapping[str, tuple[Any, Any]],
    tasks: Mapping[str, Task],
    hints: Hints,
    limit: int,
) -> Accuracy:
    """Share answered correctly by the policy with each expert's own greedy answer as its textual hint.

    policy: model and tokenizer.
    experts: model and tokenizer per task.
    """
    found: Accuracy = {}
    for name, task in tasks.items():
        prompts = task.test[:limit]
        own = {part: greedy(*expert, _tokens(expert[1], prompts)) for part, expert in experts.items()}
        rows = [hints.of(p, {part: answers[i] for part, answers in own.items()}) for i, p in enumerate(prompts)]
        found[name] = _scored(task, prompts, greedy(*policy, _tokens(policy[1], prompts), rows))
    return found


def _tokens(tokenizer: Any, prompts: tuple[Prompt, ...]) -> list[list[int]]:
    return [list(row) for row in tokenizer([prompt.text for prompt in prompts])["input_ids"]]


def _scored(task: Task, prompts: tuple[Prompt, ...], answers: list[str]) -> float:
    return _mean([task.verifier.score(a, p) >= 0.99 for a, p in zip(answers, prompts, strict=True)])


def _mean(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4) if values else float("nan")
