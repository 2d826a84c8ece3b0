"""Which prompts are held out, and how a task's pools are balanced by answer.

The split of a prompt depends on its text (with `data.split_by: question` on its question's) and the two shares alone:
not on the seed, the task's size or the other tasks.  So whoever builds tasks at another size or with another seed, such
as the zoo, never trains on a prompt that a run holds out.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Literal

from rewards.config import AnswerRange, DataConfig
from rewards.verify import RewardsError, integer
from rollout.types import Prompt

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_SALT = "n-musketeers split 1\n"


def split_of(text: str, data: DataConfig) -> Split:
    """The split of a prompt with this text.

    Test takes the low end of the hash and validation the high end, so that changing one share
    leaves the other split as it was.
    """
    digest = hashlib.sha256((_SALT + text).encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < data.test:
        return "test"
    return "validation" if position >= 1.0 - data.validation else "train"


def split_text(prompt: Prompt) -> str:
    """What a prompt's split depends on: all it says but the system message."""
    return "\n".join(message["content"] for message in prompt.messages if message["role"] != "system")


def split_in(entry: Prompt, data: DataConfig) -> Split:
    """The split of an entry: its source's own where it has one, else by its text or, as configured, its question."""
    own: Split | None = entry.payload.get("split")
    if own is not None:
        return own
    return split_of(entry.payload["question"] if data.split_by == "question" else split_text(entry), data)


def shares(size: int, data: DataConfig) -> dict[Split, int]:
    """How many of `size` compositions each split gets."""
    held_out = {"validation": round(size * data.validation), "test": round(size * data.test)}
    return {split: held_out.get(split, size - sum(held_out.values())) for split in SPLITS}


def questions_of(prompt: Prompt) -> list[dict[str, str]]:
    """The questions in a prompt, each with its task and answer: its parts', or its own."""
    own = {"task": prompt.task, "question": prompt.payload["question"], "answer": prompt.answer}
    return [dict(part) for part in prompt.payload.get("parts", (own,))]


def check_questions(pools: Mapping[str, Mapping[Split, Sequence[Prompt]]]) -> None:
    """Make sure that no question, alone or as a part, is in two splits.

    pools: of every task, by its name.

    Raises:
        RewardsError: naming the two tasks and the question.
    """
    seen: dict[str, tuple[Split, str]] = {}
    for task, by_split in pools.items():
        for split, pool in by_split.items():
            for question in {part["question"] for prompt in pool for part in questions_of(prompt)}:
                other, where = seen.setdefault(question, (split, task))
                if other != split:
                    raise RewardsError(
                        f"task {task!r}: this question is in {split}, and in {other} of task {where!r}: "
                        f"{question[:80]!r}; leave one of the tasks out, or set data.split_by to entry"
                    )


def check_disjoint(task: str, pools: dict[Split, tuple[Prompt, ...]]) -> None:
    """Make sure that no text is in two splits and no held-out text comes twice.

    Raises:
        RewardsError: naming the task and the text.
    """
    seen: dict[str, Split] = {}
    for split, pool in pools.items():
        texts = Counter(prompt.text for prompt in pool)
        for text, count in texts.items():
            if text in seen:
                raise RewardsError(f"task {task!r}: this prompt is both in {seen[text]} and in {split}: {text[:80]!r}")
            if count > 1 and split != "train":
                raise RewardsError(f"task {task!r}: this prompt is {count} times in {split}: {text[:80]!r}")
            seen[text] = split


def within(entries: Iterable[Prompt], answers: AnswerRange | None) -> list[Prompt]:
    """The entries whose answer is an integer in the range; all of them when there is no range."""
    if answers is None:
        return list(entries)
    return [entry for entry in entries if _inside(integer(entry.answer), answers)]


def _inside(value: int | None, answers: AnswerRange) -> bool:
    return value is not None and answers.min <= value <= answers.max


class Balance:
    """Draws entries so that an answer with share f of the raw entries comes up in proportion to f ** exponent.

    raw: every entry of the task, all splits, whose answers' frequencies are the f.
    exponent: 1 draws the entries as they come, 0 makes every answer equally likely.
    """

    def __init__(self, raw: Sequence[Prompt], exponent: float) -> None:
        counts = Counter(entry.answer for entry in raw)
        self.weights = {answer: (count / len(raw)) ** exponent for answer, count in counts.items()}

    def resample(self, entries: Sequence[Prompt], count: int, rng: Random) -> list[Prompt]:
        """`count` entries in random order, repeats allowed, each answer as often as its weight says.

        Within an answer the entries take turns, so none comes twice before all have come once.
        """
        by_answer = self._shuffled(entries, rng)
        quotas = apportion({answer: self.weights[answer] for answer in by_answer}, count)
        drawn = [pool[i % len(pool)] for answer, pool in by_answer.items() for i in range(quotas[answer])]
        rng.shuffle(drawn)
        return drawn

    def order(self, entries: Sequence[Prompt], rng: Random) -> list[Prompt]:
        """All of `entries`, each once, such that any first n are about as balanced as they can be."""
        return list(self._order(self._shuffled(entries, rng), rng))

    def _order(self, by_answer: dict[str, list[Prompt]], rng: Random) -> Iterator[Prompt]:
        left = {answer: len(pool) for answer, pool in by_answer.items()}
        while left:
            answers = list(left)
            answer = rng.choices(answers, [self.weights[a] for a in answers])[0]
            left[answer] -= 1
            yield by_answer[answer][left[answer]]
            if not left[answer]:
                del left[answer]

    @staticmethod
    def _shuffled(entries: Sequence[Prompt], rng: Random) -> dict[str, list[Prompt]]:
        by_answer: defaultdict[str, list[Prompt]] = defaultdict(list)
        for entry in entries:
            by_answer[entry.answer].append(entry)
        for pool in by_answer.values():
            rng.shuffle(pool)
        return by_answer


def apportion(weights: dict[str, float], count: int) -> dict[str, int]:
    """Whole numbers that sum to `count` and follow `weights` (largest remainders)."""
    total = sum(weights.values())
    exact = {key: count * weight / total for key, weight in weights.items()}
    whole = {key: int(value) for key, value in exact.items()}
    by_remainder = sorted(exact, key=lambda key: whole[key] - exact[key])
    for key in by_remainder[: count - sum(whole.values())]:
        whole[key] += 1
    return whole
