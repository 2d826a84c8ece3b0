"""Entries of every Reasoning Gym data set, right answers to them in many spellings, and wrong answers.

`python -m tests.rewards.gym_samples` prints the tables of docs/tasks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from reasoning_gym.factory import DATASETS

from rewards.config import DataConfig, TaskConfig
from rewards.gym import GymVerifier
from rewards.sources import all_entries
from rewards.verify import READING_ERRORS
from rollout.types import Prompt

# What takes seconds an entry by default is generated smaller: what is tested is the scoring.
SMALLER: dict[str, dict[str, Any]] = {
    "knight_swap": {"impossible_ratio": 1.0},
    "futoshiki": {"max_board_size": 5, "max_difficulty": 1},
    "intermediate_integration": {"problem_type_weights": [1, 0, 0, 0, 0, 0, 0, 0]},
    "puzzle24": {"max_value": 6},
    "sokoban": {"max_w": 6, "max_h": 6, "max_boxes": 4},
    "zebra_puzzles": {"num_people": 3, "num_characteristics": 3},
}
NEEDS_OTHERS = {"composite"}  # a mixture of other data sets, which our own streams do better
WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # many answers are right
NAMES = sorted(set(DATASETS) - NEEDS_OTHERS)

# The fullest spelling of each kind that is accepted everywhere.
SPELLINGS: dict[str, str] = {
    "the bare answer": "GOLD",
    "tags": "<answer>GOLD</answer>",
    "tags in a sentence": "I think it is <answer>GOLD</answer>, as shown above.",
    "tags in capitals": "<Answer> GOLD </ANSWER>",
    "a tag that is not closed": "Thus <answer>GOLD",
    "boxed": r"So it is \boxed{GOLD}",
    "boxed in tags": r"<answer>$\boxed{\text{GOLD}}$</answer>",
    "bold": "**GOLD**",
    "bold in tags": "<answer>**GOLD**</answer>",
    "a sentence": "We count again.\nThe answer is GOLD",
    "a sentence of two lines": "The final answer is:\n\nGOLD",
    "a final full stop": "GOLD.",
    "spaces and lines": " \n GOLD\n\n",
    "a code block": "```text\nGOLD\n```",
    "inline code": "`GOLD`",
    "dollars": "$GOLD$",
    "GSM8K's mark": "We count again.\n#### GOLD",
    "behind thoughts": "<think>Is it <answer>42</answer>?</think>\nGOLD",
}
# A full stop more is another text where the gold answer ends in one.
NOT_SPELLED = {
    "emoji_mystery": {"a final full stop"},
    "sentence_reordering": {"a final full stop"},
}


def _changed(text: str, last: bool) -> str:
    """The text with its first or last digit changed, or letter where it has no digit."""
    for usable in (str.isdigit, str.isalpha):
        places = [at for at, character in enumerate(text) if usable(character)]
        if places:
            at = places[-1 if last else 0]
            new = str((int(text[at]) + 1) % 10) if text[at].isdecimal() else "b" if text[at] not in "bB" else "c"
            return text[:at] + new + text[at + 1 :]
    return text + "x"


Wrong = Callable[[str, str, Prompt], str]
# From the gold answer, that of another entry, and the prompt.
WRONG: dict[str, Wrong] = {
    "another entry's": lambda gold, other, prompt: other,
    "empty": lambda gold, other, prompt: "",
    "0": lambda gold, other, prompt: "0",
    "1": lambda gold, other, prompt: "1",
    "True": lambda gold, other, prompt: "True",
    "False": lambda gold, other, prompt: "False",
    "nan": lambda gold, other, prompt: "nan",
    "inf": lambda gold, other, prompt: "inf",
    "{}": lambda gold, other, prompt: "{}",
    "[]": lambda gold, other, prompt: "[]",
    "null": lambda gold, other, prompt: "null",
    "[[]]": lambda gold, other, prompt: "[[]]",
    "the prompt": lambda gold, other, prompt: prompt.text,
    "the question": lambda gold, other, prompt: prompt.payload["entry"]["question"],
    "and more": lambda gold, other, prompt: f"{gold} and 99999",
    "more before": lambda gold, other, prompt: f"99999 {gold}",
    "and the opposite": lambda gold, other, prompt: f"{gold} or the opposite",
    "a line more": lambda gold, other, prompt: f"{gold}\nnothing",
    "one of a list": lambda gold, other, prompt: f"{gold}, 7",
    "a digit more": lambda gold, other, prompt: f"{gold}7",
    "first changed": lambda gold, other, prompt: _changed(gold, last=False),
    "last changed": lambda gold, other, prompt: _changed(gold, last=True),
    "twice": lambda gold, other, prompt: f"{gold} {gold}",
    "twice, with a comma": lambda gold, other, prompt: f"{gold}, {gold}",
    "twice, in lines": lambda gold, other, prompt: f"{gold}\n{gold}",
    "negated": lambda gold, other, prompt: f"-{gold}",
    "not": lambda gold, other, prompt: f"not {gold}",
    "not at all": lambda gold, other, prompt: f"not at all {gold}",
    "first half": lambda gold, other, prompt: gold[: len(gold) // 2],
    "reversed": lambda gold, other, prompt: gold[::-1],
    "not, but": lambda gold, other, prompt: f"not {gold} but {other}",
    "or": lambda gold, other, prompt: f"{gold} or {other}",
    "the other or": lambda gold, other, prompt: f"{other} or {gold}",
    "taken back": lambda gold, other, prompt: f"<answer>{gold}</answer> No: <answer>{other}</answer>",
    "thought only": lambda gold, other, prompt: f"<think>It is <answer>{gold}</answer>",
}
# Where such an answer is right after all, and why.
ALSO_RIGHT: dict[str, tuple[set[str], str]] = {
    "advanced_geometry": ({"first half"}, "90 is 90.00°"),
    "codeio": ({"last changed", "a digit more"}, "the last of 17 digits changes no 64-bit float"),
    "coin_flip": ({"first half"}, "a probability rounded to four decimals or more"),
    "complex_arithmetic": ({"first half"}, "12 is 12.00"),
    "cryptarithm": ({"last changed", "first changed"}, "another solution"),
    "graph_color": ({"first changed", "last changed", "another entry's", "taken back"}, "another colouring"),
    "intermediate_integration": ({"more before", "a digit more"}, "another constant: 99999 - 4*x**2, C7"),
    "simple_integration": ({"more before", "a digit more"}, "another constant: 99999 - x**9, C7"),
    "number_format": (
        {"last changed", "a digit more"}, "digits behind the third decimal, which are a float's rounding"
    ),
    "polynomial_equations": ({"0", "negated", "first half"}, "0 and -0.0 are 0.0; digits behind the fourth"),
    "power_function": (
        {"1", "last changed", "first half", "a digit more"}, "three significant digits are asked for"
    ),
    "prime_factorization": ({"reversed"}, "factors in another order"),
    "products": ({"negated"}, "-0 is 0"),
    "propositional_logic": (
        {"first half", "another entry's", "taken back"}, "another conclusion that follows and is not trivial"
    ),
    "puzzle24": ({"reversed"}, "another expression of the numbers"),
    "quantum_lock": (
        {"reversed", "first changed", "last changed"}, "another sequence of that length reaches the target"
    ),
    "rush_hour": (
        {"first changed", "last changed", "twice", "twice, with a comma", "twice, in lines"},
        "a car goes as far as it can, and moves behind the last one do no harm",
    ),
    "sokoban": ({"another entry's", "taken back", "twice", "twice, in lines"}, "all boxes stand on goals in the end"),
    "time_intervals": ({"first half"}, "34 is 34 days where days are asked for"),
}  # fmt: skip


@cache
def samples(name: str, count: int, seed: int = 7) -> tuple[list[Prompt], GymVerifier]:
    """Entries of a data set and its verifier."""
    task = TaskConfig(name="t", dataset=name, size=count, config=SMALLER.get(name, {}))
    entries, verifier = all_entries(task, DataConfig(seed=seed, tasks=(task,)))
    assert isinstance(verifier, GymVerifier)
    return entries, verifier


def right_answer(prompt: Prompt, verifier: GymVerifier) -> str | None:
    """The gold answer, or the witness of an entry without one."""
    if prompt.payload["entry"]["answer"] is not None:
        return prompt.answer
    good = verifier.known_good(prompt)
    return good and good.split("<answer>")[1].removesuffix("</answer>")


def verdict(verifier: GymVerifier, answer: str, prompt: Prompt) -> float:
    """The score; 0 for an answer that cannot be read."""
    try:
        return verifier.score(answer, prompt)
    except READING_ERRORS:
        return 0.0


def render() -> str:
    """The tables of docs/tasks.md."""
    lines = ["| spelling | for instance | not in |", "|---|---|---|"]
    for name, example in SPELLINGS.items():
        shown = example.replace("\n", "⏎").replace("```", "'''").replace("|", "\\|").replace("`", "'")
        exceptions = ", ".join(sorted(data for data, left in NOT_SPELLED.items() if name in left))
        lines.append(f"| {name} | `{shown}` | {exceptions} |")
    lines += ["", "| data set | right although it looks wrong | why |", "|---|---|---|"]
    lines += [f"| {data} | {'; '.join(sorted(kinds))} | {why} |" for data, (kinds, why) in sorted(ALSO_RIGHT.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(render())
