"""The textual hint: what fills the policy's slots when an answer is handed to it as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.zoo.recipe import FILLER, HintRecipe
from rewards.sources import Task
from rollout.types import Prompt

OPERATOR = "+"
RANDOM_OTHERS = 0.75  # of a lone task's training hints: there the other experts still say something


class Hints:
    """Writes hint regions of a policy's recipe in its tokens."""

    def __init__(self, recipe: HintRecipe, tasks: Mapping[str, Task], tokenizer: Any) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.filler: int = tokenizer.convert_tokens_to_ids(FILLER)
        self.operator: int = tokenizer.encode(OPERATOR)[0]
        composed = next((task for task in tasks.values() if task.config.compose), None)
        self.parts: tuple[str, ...] = composed.config.compose or () if composed else ()
        self.values: list[str] = (
            sorted({part["answer"] for p in composed.train for part in p.payload["parts"]}) if composed else []
        )

    def blank(self) -> list[int]:
        """Filler only."""
        return [self.filler] * self.recipe.slots

    def answer(self, tokens: Sequence[int]) -> list[int]:
        """An answer's tokens, then filler."""
        return [*tokens, *self.blank()][: self.recipe.slots]

    def operands(self, answers: Mapping[str, str]) -> list[int]:
        """Answers per part task as `a + b`; a part without an answer, or one of several tokens, is filler."""
        region = self.blank()
        for index, task in enumerate(self.parts):
            tokens = self.tokenizer.encode(answers.get(task, ""))
            if index:
                region[2 * index - 1] = self.operator
            if len(tokens) == 1:
                region[2 * index] = tokens[0]
        return region

    def of(self, prompt: Prompt, answers: Mapping[str, str]) -> list[int]:
        """The hint for a prompt, given what each task's expert answers to it."""
        if self.recipe.layout == "operands":
            return self.operands(answers)
        return self.answer(self.tokenizer.encode(answers.get(prompt.task, "")))

    def right(self, prompt: Prompt, rng: np.random.Generator | None = None) -> list[int]:
        """The right hint; of a lone part task the other operands are filler, or mostly random ones if rng is given."""
        if self.recipe.layout == "answer":
            return self.answer(self.tokenizer.encode(prompt.answer))
        answers = {prompt.task: prompt.answer}
        if parts := prompt.payload.get("parts"):
            answers = {part["task"]: part["answer"] for part in parts}
        elif rng is not None and rng.random() < RANDOM_OTHERS:
            answers = {task: str(rng.choice(self.values)) for task in self.parts} | answers
        return self.operands(answers)
