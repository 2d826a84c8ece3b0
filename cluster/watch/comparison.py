"""Several runs beside each other: accuracies and paired differences over seeds and prompts.

Runs that differ in nothing but their seed are one arm.  Every run answered the same held-out prompts, so seeds and
prompts are two crossed factors, and an interval holds what both might have been otherwise.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cluster.watch.intervals import Accuracy, beats_the_best_of, bounded
from cluster.watch.results import COMPOSED, MEAN

RESAMPLES = 10_000
Outcomes = Mapping[str, Sequence[int]]


class ComparisonError(ValueError):
    """Runs that cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    settings: its flat configuration.  outcomes: of its router, per task, 0 or 1 a prompt.
    name: of its arm; None lets `settings` tell.  constant: nothing in it was trained, so that it is the same for all
        seeds.
    prompts: a hash of those that it was measured on; empty in runs that did not write one.
    frozen: a hash of each model's weights, by what the configuration calls it.
    pools: a hash of each task's prompts, those for training among them; empty in runs that did not write any.
    train_s: seconds of its training, the start of the router included.
    operations, operations_cold: floating-point operations of that, and what they would be without a cache of the
        experts' features; 0 where they are not known.
    """

    folder: Path
    seed: int
    settings: Mapping[str, Any]
    outcomes: Outcomes
    samples: int
    train_s: float
    name: str | None = None
    constant: bool = False
    operations: float = 0.0
    operations_cold: float = 0.0
    prompts: str = ""
    frozen: Mapping[str, str] = field(default_factory=dict)
    pools: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """An accuracy or a difference with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """In percent."""
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only.

    label: what tells it from the other arms.  seeds: none where nothing was trained.
    accuracy: by column.  by_seed: the same, one value a seed.
    difference: from the first arm over the seeds that both have; empty for the first.
    """

    label: str
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    samples: int
    train_s: float
    operations: float
    operations_cold: float
    accuracy: Mapping[str, Cell]
    difference: Mapping[str, Cell]
    by_seed: Mapping[str, tuple[float, ...]]


def compare(runs: Sequence[Run], seed: int = 0) -> list[Arm]:
    """The arms in the order of their first runs; the first is what the others are compared with.

    Raises:
        ComparisonError: when runs answered different prompts or had other models or training prompts than their
            settings say, an arm has a seed twice, or an arm shares no seed with the first.
    """
    counts = {tuple((task, len(given)) for task, given in sorted(run.outcomes.items())) for run in runs}
    if len(counts) > 1 or len({run.prompts for run in runs} - {""}) > 1:
        raise ComparisonError("the runs answered different held-out prompts: compare runs of equal data and evaluation")
    _same_models(runs)
    _same_pools(runs)
    arms: dict[str, dict[int, Run]] = {}
    for run, label in zip(runs, labels(runs), strict=True):
        if run.seed in (mine := arms.setdefault(label, {})):
            raise ComparisonError(f"{run.folder} and {mine[run.seed].folder} are the same arm and seed {run.seed}")
        mine[run.seed] = run
    seeds = sorted({run.seed for run in runs if not run.constant} or {runs[0].seed})
    for label, mine in arms.items():
        if all(run.constant for run in mine.values()):
            arms[label] = dict.fromkeys(seeds, next(iter(mine.values())))
    (first_label, first), *_ = arms.items()
    columns = _columns(runs[0].outcomes)
    found = []
    for label, mine in arms.items():
        shared = sorted(mine.keys() & first.keys())
        if not shared:
            raise ComparisonError(
                f"the arm {label!r} shares no seed with {first_label!r}: differences are paired by seed"
            )
        trained = tuple(s for s in sorted(mine) if not mine[s].constant)
        alone = [mine[s].outcomes for s in sorted(mine)]
        differences = [_minus(mine[s].outcomes, first[s].outcomes) for s in shared]
        found.append(
            Arm(
                label=label,
                seeds=trained,
                runs=tuple(dict.fromkeys(str(mine[s].folder) for s in sorted(mine))),
                samples=round(np.mean([run.samples for run in mine.values()])),
                train_s=float(np.mean([run.train_s for run in mine.values()])),
                operations=_known_mean([run.operations for run in mine.values()]),
                operations_cold=_known_mean([run.operations_cold for run in mine.values()]),
                accuracy={column: crossed(alone, column, seed) for column in columns},
                difference={c: crossed(differences, c, seed, -1.0) for c in columns} if label != first_label else {},
                by_seed={column: tuple(_mean(mine[s].outcomes, column) for s in trained) for column in columns},
            )
        )
    return found


@dataclass(frozen=True)
class Primary:
    """The one comparison that was declared beforehand: the first arm against the best of its rivals.

    difference: of the first arm from that rival, on `column`.  rivals: how many there are.
    """

    column: str
    first: str
    rival: str
    difference: Cell
    rivals: int = 1

    @property
    def text(self) -> str:
        """In words."""
        where = "on the mean over tasks" if self.column == MEAN else f"on {self.column}"
        points = in_points(self.difference)
        if self.difference.low > 0:
            return f"{self.first} wins {where}: {points} points over the best rival ({self.rival})."
        if beats_the_best_of(self.rivals, self.difference.value, self.difference.high):
            return f"{self.rival} wins {where}: {self.first} is {points} points beside it."
        return f"No difference shown {where}: {self.first} is {points} points beside the best rival ({self.rival})."


def primary(arms: Sequence[Arm], beyond: Sequence[str] = ()) -> Primary | None:
    """None where there is no rival.

    beyond: labels of arms that are no rivals.
    """
    first, *others = arms
    column = COMPOSED if COMPOSED in first.accuracy else MEAN
    rivals = [arm for arm in others if arm.label not in beyond]
    if not rivals:
        return None
    # By the seeds that both have: an arm that has run once may have been lucky.
    best = max(rivals, key=lambda arm: arm.difference[column].value)
    there = best.difference[column]
    difference = Cell(0.0 - there.value, 0.0 - there.high, 0.0 - there.low)
    return Primary(column, first.label, best.label, difference, len(rivals))


def _same_models(runs: Sequence[Run]) -> None:
    """Refuses runs in which one name stands for different weights: a zoo that was built again is another one."""
    known: dict[str, tuple[str, Run]] = {}
    for run in runs:
        for model, weights in run.frozen.items():
            first, other = known.setdefault(model, (weights, run))
            if first != weights:
                raise ComparisonError(
                    f"{other.folder} and {run.folder} had different weights of {model}: compare runs of the same models"
                )


def _same_pools(runs: Sequence[Run]) -> None:
    """Refuses runs that had other prompts though nothing in their settings says so.

    Which prompts are too long is for the policy to say: those of another policy may be others.
    """
    known: dict[str, Run] = {}
    for run in runs:
        if not run.pools:
            continue
        said = {key: value for key, value in run.settings.items() if key.startswith("data.") or key == "policy.model"}
        other = known.setdefault(json.dumps(said, sort_keys=True), run)
        for task, digest in run.pools.items():
            if other.pools.get(task) != digest:
                raise ComparisonError(
                    f"{other.folder} and {run.folder} have equal data sections and other prompts of task {task!r} (a "
                    "file, a plug-in or Reasoning Gym has changed in between): train one of them again"
                )


def without_pools(runs: Sequence[Run]) -> str:
    """What to say of runs that kept no digests of their prompts; empty where all did."""
    old = list(dict.fromkeys(str(run.folder) for run in runs if not run.pools))
    if not old:
        return ""
    return f"{', '.join(old)}: of a version that kept no data.json; whether training prompts were the same is not known"


def crossed(outcomes: Sequence[Mapping[str, Sequence[float]]], column: str, seed: int = 0, lowest: float = 0.0) -> Cell:
    """The mean over seeds and prompts with its interval; `outcomes` has one entry a seed.

    Prompts are resampled.  Seeds are few: resampling three of them gave intervals that held the truth 80 times in 100,
    so their part is drawn from Student's t with the deviation of their means.  Of one seed alone nothing is known of
    others, and the interval is one over prompts.  A mean over tasks weighs them alike, and tasks' prompts are resampled
    each for itself; see also `bounded`.

    Args:
        lowest: that an outcome can be: -1 for differences.
    """
    generator, count = np.random.default_rng(seed), len(outcomes)
    tasks = list(outcomes[0]) if column == MEAN else [column]
    tables = [np.array([given[task] for given in outcomes], dtype=float) for task in tasks]
    means = np.zeros(RESAMPLES)
    if count > 1:
        by_seed = np.mean([table.mean(axis=1) for table in tables], axis=0)
        means += generator.standard_t(count - 1, size=RESAMPLES) * by_seed.std(ddof=1) / math.sqrt(count)
    for table in tables:
        prompts = table.shape[1]
        drawn = generator.multinomial(prompts, [1 / prompts] * prompts, size=RESAMPLES) / prompts
        means += drawn @ table.mean(axis=0) / len(tables)
    found = [Accuracy(float(table.mean()), table.shape[1]) for table in tables]
    bounds = bounded(means, found, lowest)
    return Cell(sum(task.share for task in found) / len(found), bounds.low, bounds.high)


def labels(runs: Sequence[Run]) -> list[str]:
    """For each run its name, or the settings in which it differs from any other without one, apart from its seed."""
    nameless = [run for run in runs if run.name is None]
    keys = sorted({key for run in nameless for key in run.settings})
    differing = [key for key in keys if len({json.dumps(run.settings.get(key)) for run in nameless}) > 1]
    told = {id(r): ", ".join(f"{key}={r.settings.get(key)}" for key in differing) or "all the same" for r in nameless}
    return [run.name if run.name is not None else told[id(run)] for run in runs]


TITLE = "accuracy, % [95 % over seeds and prompts]"


@dataclass(frozen=True)
class Comparison:
    """For the terminal: accuracies, then differences from the first arm, in points.

    One table where it fits, else one for each column.
    """

    arms: Sequence[Arm]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = self._whole()
        if console.measure(whole, options=options.update(max_width=10_000)).maximum <= options.max_width:
            yield whole
            return
        spent = _by_arm("what it took", "seeds", "samples", "PFLOP")
        for arm in self.arms:
            spent.add_row(arm.label, *_spent(arm))
        yield spent
        for column in self.arms[0].accuracy:
            shown = _by_arm(f"{column}: {TITLE}", "accuracy", "difference")
            for arm in self.arms:
                difference = _signed(arm.difference[column]) if column in arm.difference else ""
                shown.add_row(arm.label, arm.accuracy[column].text, difference)
            yield shown

    def _whole(self) -> Table:
        columns = list(self.arms[0].accuracy)
        shown = _by_arm(f"{TITLE}; below it the difference from the first arm", "seeds", "samples", "PFLOP", *columns)
        for arm in self.arms:
            cells = []
            for column in columns:
                cell = Text(arm.accuracy[column].text)
                if column in arm.difference:
                    cell.append("\n").append_text(_signed(arm.difference[column]))
                cells.append(cell)
            shown.add_row(arm.label, *_spent(arm), *cells)
        return shown


def _by_arm(title: str, *columns: str) -> Table:
    shown = Table("arm", title=title)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def _spent(arm: Arm) -> tuple[str, str, str]:
    operations = f"{arm.operations / 1e15:.2g}" if arm.operations else "–"
    return str(len(arm.seeds) or "–"), f"{arm.samples:,}", operations


def markdown(arms: Sequence[Arm]) -> str:
    """The same as a Markdown table."""
    columns = list(arms[0].accuracy)
    head = ("arm", "seeds", "seconds", "PFLOP (uncached)", *columns)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in arms:
        cells = [
            arm.accuracy[c].text + (f"<br>{in_points(arm.difference[c])}" if c in arm.difference else "")
            for c in columns
        ]
        spent = ("–", "–", "–")
        if arm.seeds:
            operations = f"{arm.operations / 1e15:.2g} ({arm.operations_cold / 1e15:.2g})" if arm.operations else "–"
            spent = (str(len(arm.seeds)), f"{arm.train_s:.0f}", operations)
        lines.append(f"| {' | '.join((arm.label, *spent, *cells))} |")
    return "\n".join(lines) + "\n"


def write(arms: Sequence[Arm], folder: Path) -> list[Path]:
    """`results.json`, `results.csv` and `results.md`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ("arm", "seeds", "column", "accuracy", "low", "high", "difference", "difference_low", "difference_high")
    )
    for arm in arms:
        for column, cell in arm.accuracy.items():
            other = arm.difference.get(column)
            more = (other.value, other.low, other.high) if other else ("", "", "")
            rows.writerow((arm.label, len(arm.seeds), column, cell.value, cell.low, cell.high, *more))
    texts = {
        "results.json": json.dumps([asdict(arm) for arm in arms], indent=1) + "\n",
        "results.csv": text.getvalue(),
        "results.md": markdown(arms),
    }
    for name, content in texts.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in texts]


def _columns(outcomes: Outcomes) -> list[str]:
    return [*sorted(outcomes, key=lambda task: (task != COMPOSED, task)), MEAN]


def _mean(outcomes: Outcomes, column: str) -> float:
    tasks = list(outcomes) if column == MEAN else [column]
    return float(np.mean([np.mean(outcomes[task]) for task in tasks]))


def _known_mean(values: Sequence[float]) -> float:
    """Over seeds; 0, which is not known, unless all are known."""
    return float(np.mean(values)) if all(values) else 0.0


def _minus(one: Outcomes, other: Outcomes) -> dict[str, list[float]]:
    return {task: [a - b for a, b in zip(one[task], other[task], strict=True)] for task in one}


def in_points(cell: Cell) -> str:
    """A difference, in points."""
    return f"{100 * cell.value:+.1f} [{100 * cell.low:+.1f}, {100 * cell.high:+.1f}]"


def _signed(cell: Cell) -> Text:
    style = "green" if cell.low > 0 else "red" if cell.high < 0 else "bright_black"
    return Text(in_points(cell), style=style)
