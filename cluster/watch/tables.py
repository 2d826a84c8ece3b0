"""The end of a run on the terminal: held-out accuracy of every system, attention, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.watch.chart import bar
from cluster.watch.panels import COLOURS, DASH, DIM
from cluster.watch.results import (
    MEAN,
    ORACLE,
    ROUTER,
    Evaluation,
    Result,
    Verdict,
    accuracy,
    interval,
    label,
    tasks_of,
    verdict,
)

Attention = Mapping[str, Mapping[str, float]]
"""Share of attention per task and expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One accuracy, as percentages: `value` such as `57.5` and its 95 % `interval` such as `53–62`.

    best: no other system is better in this column; hindsight and the router before training do not count.
    """

    value: str
    interval: str
    best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system's cells, in the order of the columns."""

    system: str
    label: str
    cells: tuple[Cell, ...]


def columns(evaluation: Evaluation) -> list[str]:
    """The columns of the results: every task, then the mean."""
    return [*tasks_of(evaluation), MEAN]


def result_rows(evaluation: Evaluation, before: Evaluation | None = None) -> list[Row]:
    """The results as text, one row per system; the router before training comes right after the trained one."""
    names = columns(evaluation)
    competing = [result for system, result in evaluation.items() if system != ORACLE]
    best = {name: max(accuracy(result, name) or 0.0 for result in competing) for name in names if competing}
    rows = []
    for system, result in evaluation.items():
        cells = tuple(_cell(result, name, None if system == ORACLE else best[name]) for name in names)
        rows.append(Row(system=system, label=label(system), cells=cells))
        if system == ROUTER and before and ROUTER in before:
            cells = tuple(_cell(before[ROUTER], name, None) for name in names)
            rows.append(Row(system="before", label="router before training", cells=cells))
    return rows


def results_table(evaluation: Evaluation, before: Evaluation | None = None) -> Table:
    """Held-out accuracy in percent with 95 % intervals, the best of each column in bold."""
    table = _table("Held-out accuracy, % with 95 % intervals")
    for name in columns(evaluation):
        table.add_column(name, justify="right")
    for row in result_rows(evaluation, before):
        style = COLOURS[0] if row.system == ROUTER else DIM if row.system in (ORACLE, "before") else ""
        cells = [
            Text.assemble((cell.value, "bold" if cell.best else ""), (f" {cell.interval:>6}", DIM))
            for cell in row.cells
        ]
        table.add_row(Text(row.label, style=style), *cells)
    return table


def attention_table(attention: Attention) -> Table:
    """Share of the router's attention per task and expert, with bars."""
    experts = list(dict.fromkeys(expert for shares in attention.values() for expert in shares))
    table = _table("Attention on the experts")
    for expert in experts:
        table.add_column(expert)
    for task, shares in attention.items():
        cells = [
            Text.assemble((f"{bar(shares[expert], 10)} ", COLOURS[0]), f"{shares[expert]:.2f}")
            if expert in shares
            else Text(DASH)
            for expert in experts
        ]
        table.add_row(task, *cells)
    return table


def print_results(
    console: Console, evaluation: Evaluation, *, before: Evaluation | None = None, attention: Attention | None = None
) -> Verdict:
    """Print the results, the attention if given, and the verdict; returns the verdict.

    before: the evaluation before training, of which the router's row is shown.

    Raises:
        ValueError: when the router or every baseline is missing.
    """
    outcome = verdict(evaluation)
    console.print(results_table(evaluation, before))
    if attention:
        console.print(attention_table(attention))
    lost = outcome.comparisons[0].lost
    console.print(Text(outcome.text, style="bold green" if outcome.won else "bold yellow" if lost else "bold"))
    if outcome.hindsight:
        console.print(Text(outcome.hindsight, style=DIM))
    return outcome


def without_rows(found: Mapping[str, Any]) -> list[tuple[str, list[str], bool]]:
    """What the router's accuracy becomes without each expert, with nothing in its place and with a stand-in.

    found: as of `cluster.run.substitution.Found.as_data`.  Rows of a label, percentages, and whether it is so in use.
    """
    rows = [("router", _percent(found["whole"]), True)]
    for expert, each in found["without"].items():
        rows.append((f"without {expert}", _percent(each["hidden"]), not each["used"]))
        if each["used"]:
            rows.append((f"stand-in for {expert}", _percent(each["stood_in"]), True))
    return rows


def without_table(found: Mapping[str, Any]) -> Table:
    """See `without_rows`."""
    table = _table("An expert is away: validation accuracy, %")
    for name in found["whole"]:
        table.add_column(name, justify="right")
    for place, (title, shares, used) in enumerate(without_rows(found)):
        table.add_row(title, *shares, style=DIM if not used else "" if place else COLOURS[0])
    return table


def _percent(accuracies: Mapping[str, float]) -> list[str]:
    return [f"{100 * value:.1f}" for value in accuracies.values()]


def _cell(result: Result, column: str, best: float | None) -> Cell:
    """A cell; `best` is the column's best accuracy, None where the row does not compete."""
    value, bounds = accuracy(result, column), interval(result, column)
    if value is None or bounds is None:
        return Cell(value=DASH, interval="")
    return Cell(
        value=f"{100 * value:.1f}",
        interval=f"{100 * bounds.low:.0f}–{100 * bounds.high:.0f}",
        best=best is not None and value >= best > 0,
    )


def _table(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", border_style=DIM)
    table.add_column("")
    return table
