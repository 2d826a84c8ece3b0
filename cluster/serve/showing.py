"""`musketeers generate`: answers in the terminal, beside whom the router listened to."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from cluster.serve.local import Answer, Compared, Musketeers

BAR = 20  # characters of a whole attention


@dataclass(frozen=True)
class Wanted:
    """See `Musketeers.generate`.  compare: also the policy and the experts alone.  as_json: for programs."""

    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    max_new_tokens: int | None = None
    compare: bool = False
    as_json: bool = False


def answer_questions(
    place: str, step: int | None, overrides: Sequence[str], questions: Sequence[str], wanted: Wanted, console: Console
) -> None:
    """Prints an answer to every question; `-` stands for the lines of standard input.

    Raises:
        ValueError: one line, when there is no such router, or a question is too long.
    """
    asked = [line for given in questions for line in (_lines() if given == "-" else [given])]
    with Console(stderr=True).status("loading the experts and the policy"):
        musketeers = Musketeers.from_run(place, *overrides, step=step)
    with musketeers:
        answers = musketeers.generate(
            asked,
            temperature=wanted.temperature,
            max_new_tokens=wanted.max_new_tokens,
            samples=wanted.samples,
            seed=wanted.seed,
        )
        compared: Sequence[Compared | None] = [None] * len(asked)
        if wanted.compare:
            compared = musketeers.compare(asked, max_new_tokens=wanted.max_new_tokens)
    for question, answer, beside in zip(asked, answers, compared, strict=True):
        if wanted.as_json:
            more = {} if beside is None else {"alone": beside.alone, "experts": dict(beside.experts)}
            print(json.dumps({"prompt": question, **asdict(answer), **more}, ensure_ascii=False), flush=True)
        else:
            _show(console, question, answer, beside, len(asked) > 1)


def _lines() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


def _show(console: Console, question: str, answer: Answer, beside: Compared | None, several: bool) -> None:
    if several:
        console.print(f"\n{question}", style="bold", markup=False, highlight=False)
    for text in answer.texts:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if answer.gate:
        table = Table("expert", "attention", "", box=None, header_style="bright_black")
        for name, share in answer.attention.items():
            table.add_row(name, f"{share:.0%}", "█" * round(BAR * share))
        console.print(table)
    else:
        console.print("without a prefix: the router has left the policy alone", style="bright_black")
    if beside is not None:
        table = Table("without the router", "", box=None, header_style="bright_black")
        table.add_row("policy alone", beside.alone)
        for name, said in beside.experts.items():
            table.add_row(f"{name} alone", said)
        console.print(table, markup=False)
