"""Arms beside each other in pictures: accuracy with every seed as a dot, and accuracy against what it cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cluster.watch.comparison import Arm
from cluster.watch.figure import COLOURS, drawn
from cluster.watch.results import COMPOSED, LABELS, MEAN, ORACLE, TEXT

# Not rivals: the one knows the answers, in the other the experts decode.
BEYOND = (LABELS[ORACLE], LABELS[TEXT])
LONGEST = 36  # characters of a label
_FAINT, _BAR = "#9aa5b1", "#cbd2d9"


def short(label: str) -> str:
    """A label for a picture: keys without their sections, and not too long."""
    plain = re.sub(r"[\w.]+\.(\w+=)", r"\1", label)
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 1]}…"


def headline(arms: Sequence[Arm]) -> str:
    """The column that decides."""
    return COMPOSED if COMPOSED in arms[0].accuracy else MEAN


def ladder_figure(arms: Sequence[Arm], path: Path) -> None:
    """Write a PNG: for the deciding column and the mean, every arm from worst to best; the first is coloured."""
    columns = list(dict.fromkeys((headline(arms), MEAN)))
    ordered = sorted(arms, key=lambda arm: arm.accuracy[columns[0]].value)
    with drawn(path, 14, 1.4 + 0.36 * len(arms), **{"axes.grid": False}) as figure:
        for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
            for place, arm in enumerate(ordered):
                cell, colour = arm.accuracy[column], COLOURS[0] if arm is arms[0] else _BAR
                axes.barh(place, 100 * cell.value, color=colour, height=0.62, alpha=0.55 if arm is arms[0] else 1.0)
                axes.plot([100 * cell.low, 100 * cell.high], [place, place], color="#1f2933", linewidth=1.4)
                dots = [100 * value for value in arm.by_seed[column]]
                spread = [place + 0.3 * ((i + 0.5) / len(dots) - 0.5) for i in range(len(dots))]
                axes.scatter(dots, spread, s=16, color="#1f2933", zorder=3, linewidths=0)
                axes.annotate(f" {100 * cell.value:.1f}", (max([100 * cell.high, *dots]), place), va="center")
            axes.set_title("mean over tasks" if column == MEAN else f"{column} task")
            axes.set_xlim(0, 109)
            axes.set_xlabel("held-out accuracy, %; lines: 95 %, dots: seeds")
        left = figure.axes[0]
        left.set_yticks(range(len(ordered)), [short(arm.label) for arm in ordered])
        for tick, arm in zip(left.yaxis.get_major_ticks(len(ordered)), ordered, strict=True):
            tick.label1.set_color(_FAINT if arm.label in BEYOND else COLOURS[0] if arm is arms[0] else "#1f2933")


def cost_figure(arms: Sequence[Arm], path: Path) -> None:
    """Write a PNG: accuracy of the arms that trained against operations, with and without a cache, and seconds."""
    column, trained = headline(arms), [arm for arm in arms if arm.seeds]
    costs = (
        ("operations of training, PFLOP", [arm.operations / 1e15 for arm in trained]),
        ("the same without a cache of features", [arm.operations_cold / 1e15 for arm in trained]),
        ("seconds of training", [arm.train_s for arm in trained]),
    )
    known = [(name, values) for name, values in costs if any(values)]
    with drawn(path, 16, 5) as figure:
        panels = figure.subplots(1, max(len(known), 1), sharey=True, squeeze=False)[0]
        for axes, (name, values) in zip(panels, known, strict=False):
            for value, arm in zip(values, trained, strict=True):
                if not value:
                    continue  # not known
                cell, colour = arm.accuracy[column], COLOURS[0] if arm is arms[0] else _FAINT
                axes.plot([value, value], [100 * cell.low, 100 * cell.high], color=colour, linewidth=1.2)
                axes.scatter([value], [100 * cell.value], color=colour, s=36, zorder=3)
                axes.annotate(f"  {short(arm.label)}", (value, 100 * cell.value), fontsize=8, va="center")
            axes.set_xlabel(name)
            axes.set_xlim(0, 1.35 * max([*values, 1e-9]))
        figure.suptitle(
            f"Held-out accuracy, {'mean over tasks' if column == MEAN else column}, %, against cost", x=0.01, ha="left"
        )
