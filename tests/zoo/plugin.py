"""Two tasks that need no data set: adding and doubling small numbers."""

from __future__ import annotations

from rewards.config import DataConfig, TaskConfig
from rewards.prompts import prompt_of
from rollout.types import Prompt


class _Sums:
    """`a plus b`, or `twice a`, over a range of numbers."""

    def __init__(self, task: TaskConfig, data: DataConfig) -> None:
        self.task, self.data = task, data

    def questions(self) -> list[tuple[str, int]]:
        raise NotImplementedError

    def entries(self) -> list[Prompt]:
        made: list[Prompt] = []
        for question, answer in self.questions():
            made.append(prompt_of(self.task, self.data, question=question, answer=str(answer), payload={}))
        return made

    def score(self, completion: str, prompt: Prompt) -> float:
        return float(completion.strip() == prompt.answer)


class Plus(_Sums):
    def questions(self) -> list[tuple[str, int]]:
        return [(f"What is {a} plus {b}?", a + b) for a in range(8) for b in range(8)]


class Twice(_Sums):
    def questions(self) -> list[tuple[str, int]]:
        endings = ("and count twice", "then double", "two times")
        return [(f"Take {a} legs {ending}.", 2 * a) for a in range(8) for ending in endings]
