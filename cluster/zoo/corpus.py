"""Training documents: what a model reads and what it must answer, drawn batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cluster.zoo.hints import Hints
from cluster.zoo.recipe import ExpertRecipe, HintRecipe, PolicyRecipe, ZooError
from rewards.sources import Task
from rollout.types import Prompt

Ids = Sequence[int]


@dataclass(frozen=True)
class Documents:
    """A batch of documents.

    hints: (batch, slots) tokens in the slots, or None where a model has no hint region.
    slot_mask: (batch, slots) False where the document has no hint region.
    scale: (batch,) 0 where the region holds zero embeddings, else 1.
    gap: (batch,) how far the positions behind the region are moved, or None.
    """

    prompts: list[Ids]
    targets: list[Ids]
    hints: Int[Tensor, "batch slots"] | None = None
    slot_mask: Bool[Tensor, "batch slots"] | None = None
    scale: Float[Tensor, " batch"] | None = None
    gap: Int[Tensor, " batch"] | None = None

    def rows(self, index: Sequence[int]) -> Documents:
        """Some of the documents."""
        prompts, targets = [self.prompts[i] for i in index], [self.targets[i] for i in index]
        rest = (self.hints, self.slot_mask, self.scale, self.gap)
        return Documents(prompts, targets, *(None if part is None else part[list(index)] for part in rest))

    def by_length(self) -> list[Documents]:
        """The documents in one or two batches, split by length where that leaves the least padding."""
        slots = 0 if self.hints is None else self.hints.shape[1]
        order = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))
        lengths = [len(self.prompts[i]) + slots for i in order]
        cost = {cut: cut * lengths[cut - 1] + (len(order) - cut) * lengths[-1] for cut in range(1, len(order) + 1)}
        cut = min(cost, key=cost.__getitem__)
        return [self.rows(part) for part in (order[:cut], order[cut:]) if part]


@dataclass(frozen=True)
class _Entry:
    prompt: Prompt
    ids: Ids
    target: Ids


class Pools:
    """The train pools of a mixture, in tokens, drawn from in its shares."""

    def __init__(self, tasks: dict[str, Task], mixture: dict[str, float], tokenizer: Any, part: str | None) -> None:
        """part: whose answer is the target; None for the whole prompt's."""
        self.names = list(mixture)
        weights = np.array([mixture[name] for name in self.names])
        self.weights = weights / weights.sum()
        self.entries = {name: _entries(tasks[name].train, tokenizer, part) for name in self.names}
        self.longest = max(len(entry.ids) for entries in self.entries.values() for entry in entries)

    def draw(self, count: int, rng: np.random.Generator) -> list[_Entry]:
        """Entries in exactly the mixture's shares, up to rounding that evens out over batches."""
        counts = np.floor(self.weights * count + rng.random()).astype(int)
        counts[-1] = count - counts[:-1].sum()
        drawn: list[_Entry] = []
        for name, number in zip(self.names, counts, strict=True):
            entries = self.entries[name]
            drawn += [entries[index] for index in rng.integers(len(entries), size=max(number, 0))]
        return drawn


class ExpertCorpus:
    """Documents [prompt][the expert's own answer]."""

    def __init__(self, recipe: ExpertRecipe, tasks: dict[str, Task], tokenizer: Any) -> None:
        self.pools = Pools(tasks, recipe.mixture, tokenizer, recipe.task)

    def draw(self, count: int, rng: np.random.Generator) -> Documents:
        """One batch."""
        drawn = self.pools.draw(count, rng)
        return Documents([entry.ids for entry in drawn], [entry.target for entry in drawn])


class PolicyCorpus:
    """Documents [hint region][prompt][answer], and the short ones of the warm phase."""

    def __init__(self, recipe: PolicyRecipe, tasks: dict[str, Task], tokenizer: Any) -> None:
        self.hint: HintRecipe = recipe.hint
        self.hints = Hints(recipe.hint, tasks, tokenizer)
        self.pools = Pools(tasks, recipe.mixture, tokenizer, None)
        self.composed = next((name for name, task in tasks.items() if task.config.compose), None)
        self.answers = {name: [entry.target for entry in entries] for name, entries in self.pools.entries.items()}
        self.tokenizer = tokenizer

    def draw(self, count: int, rng: np.random.Generator) -> Documents:
        """One batch of full documents."""
        drawn = self.pools.draw(count, rng)
        kinds = rng.permuted(np.repeat(np.arange(4), _counts(self.hint.shares, count, rng)))
        rows = [self._row(entry, int(kind), rng) for entry, kind in zip(drawn, kinds, strict=True)]
        shown = torch.from_numpy(kinds != 1)[:, None].expand(-1, self.hint.slots)
        return Documents(
            [entry.ids for entry in drawn],
            [target for _, target in rows],
            torch.tensor([hint for hint, _ in rows]),
            shown,
            torch.from_numpy((kinds != 3).astype(np.float32)),
        )

    def draw_warm(self, count: int, rng: np.random.Generator) -> Documents:
        """One batch of [hint][last line of a composed prompt][answer] with random position gaps."""
        assert self.composed is not None
        entries = self.pools.entries[self.composed]
        drawn = [entries[index] for index in rng.integers(len(entries), size=count)]
        last = self._last_line(drawn[0].prompt)
        gaps = rng.integers(self.pools.longest - len(last) + 1, size=count)
        hints = [self.hints.right(entry.prompt, rng) for entry in drawn]
        return Documents(
            [last] * count,
            [entry.target for entry in drawn],
            torch.tensor(hints),
            torch.ones(count, self.hint.slots, dtype=torch.bool),
            torch.ones(count),
            torch.from_numpy(gaps),
        )

    def _row(self, entry: _Entry, kind: int, rng: np.random.Generator) -> tuple[list[int], Ids]:
        """Hint tokens and target of one document; kinds as in HintRecipe.shares."""
        if kind == 0:
            if rng.random() < self.hint.right:
                return self.hints.right(entry.prompt, rng), entry.target
            return self.hints.answer(self._other(entry, rng)[:-1]), entry.target
        wrong = rng.random() < self.hint.corrupted
        return self.hints.blank(), self._other(entry, rng) if wrong else entry.target

    def _other(self, entry: _Entry, rng: np.random.Generator) -> Ids:
        answers = self.answers[entry.prompt.task]
        return answers[rng.integers(len(answers))]

    def _last_line(self, prompt: Prompt) -> Ids:
        question = prompt.payload["question"]
        start = prompt.text.index(question) + question.rindex("\n") + 1
        return self.tokenizer.encode(prompt.text[start:])


def own_answer(prompt: Prompt, task: str | None) -> str:
    """The prompt's answer, or that of its part of a task."""
    for part in prompt.payload.get("parts", ()):
        if part["task"] == task:
            return str(part["answer"])
    return prompt.answer


def _entries(prompts: Sequence[Prompt], tokenizer: Any, part: str | None) -> list[_Entry]:
    if not prompts:
        raise ZooError("a task of the zoo's recipe has no training prompts: enlarge its size or widen its answers")
    ids = tokenizer([prompt.text for prompt in prompts])["input_ids"]
    targets = tokenizer([own_answer(prompt, part) for prompt in prompts])["input_ids"]
    end = tokenizer.eos_token_id
    return [_Entry(p, row, [*target, end]) for p, row, target in zip(prompts, ids, targets, strict=True)]


def _counts(shares: Sequence[float], count: int, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers that sum to count and follow the shares on average."""
    edges = np.floor(np.cumsum([0.0, *shares]) * count + rng.random()).astype(int)
    edges[0], edges[-1] = 0, count
    return np.diff(edges.clip(0, count))
