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
_FAINT, _BAR, _TEXT = "#9aa5b1", "#cbd2d9", "#1f2933"
_LINE = 4.0  # points of accuracy that a label of the cost figure is high


def short(label: str) -> str:
    """A label for a picture: keys without their sections, and not too long."""
    plain = re.sub(r"[\w.]+\.(\w+=)", r"\1", label)
    return plain if len(plain) <= LONGEST else f"{plain[: LONGEST - 1]}…"


def headline(arms: Sequence[Arm]) -> str:
    """The column that decides."""
    return COMPOSED if COMPOSED in arms[0].accuracy else MEAN


def ladder_figure(arms: Sequence[Arm], path: Path, beyond: Sequence[str] = BEYOND) -> None:
    """Write a PNG: for the deciding column and the mean, every arm from worst to best; the first is coloured.

    beyond: labels of what is no rival, in grey.
    """
    columns = list(dict.fromkeys((headline(arms), MEAN)))
    ordered = sorted(arms, key=lambda arm: arm.accuracy[columns[0]].value)
    with drawn(path, 14, 1.4 + 0.36 * len(arms), **{"axes.grid": False}) as figure:
        for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
            for place, arm in enumerate(ordered):
                cell, colour = arm.accuracy[column], COLOURS[0] if arm is arms[0] else _BAR
                axes.barh(place, 100 * cell.value, color=colour, height=0.62, alpha=0.55 if arm is arms[0] else 1.0)
                axes.plot([100 * cell.low, 100 * cell.high], [place, place], color=_TEXT, linewidth=1.4)
                dots = [100 * value for value in arm.by_seed[column]]
                spread = [place + 0.3 * ((i + 0.5) / len(dots) - 0.5) for i in range(len(dots))]
                axes.scatter(dots, spread, s=16, color=_TEXT, zorder=3, linewidths=0)
                axes.annotate(f" {100 * cell.value:.1f}", (max([100 * cell.high, *dots]), place), va="center")
            axes.set_title("mean over tasks" if column == MEAN else f"{column} task")
            axes.set_xlim(0, 109)
            axes.set_xlabel("held-out accuracy, %; lines: 95 %, dots: seeds")
        left = figure.axes[0]
        left.set_yticks(range(len(ordered)), [short(arm.label) for arm in ordered])
        for tick, arm in zip(left.yaxis.get_major_ticks(len(ordered)), ordered, strict=True):
            tick.label1.set_color(_FAINT if arm.label in beyond else COLOURS[0] if arm is arms[0] else _TEXT)


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
            drawn_here = [(value, arm) for value, arm in zip(values, trained, strict=True) if value]  # 0: not known
            heights = apart([100 * arm.accuracy[column].value for _, arm in drawn_here], _LINE)
            for (value, arm), height in zip(drawn_here, heights, strict=True):
                cell, colour = arm.accuracy[column], COLOURS[0] if arm is arms[0] else _FAINT
                axes.plot([value, value], [100 * cell.low, 100 * cell.high], color=colour, linewidth=1.2)
                axes.scatter([value], [100 * cell.value], color=colour, s=36, zorder=3)
                beside = value + 0.05 * max(values)
                axes.plot([value, beside], [100 * cell.value, height], color=_BAR, linewidth=0.8, zorder=1)
                axes.annotate(f" {short(arm.label)}", (beside, height), fontsize=8, va="center", color=_TEXT)
            axes.set_xlabel(name)
            axes.set_xlim(0, 1.45 * max([*values, 1e-9]))
        figure.suptitle(
            f"Held-out accuracy, {'mean over tasks' if column == MEAN else column}, %, against cost", x=0.01, ha="left"
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Places for labels, in the same order, no two closer than `gap` and all as near as can be to these."""
    rows: list[tuple[float, list[int]]] = []  # labels that touch: the middle of where they want to be, and which
    for index in sorted(range(len(places)), key=places.__getitem__):
        rows.append((places[index], [index]))
        while len(rows) > 1 and rows[-1][0] - rows[-2][0] < gap * (len(rows[-1][1]) + len(rows[-2][1])) / 2:
            (upper, above), (lower, below) = rows.pop(), rows.pop()
            both = below + above
            rows.append(((lower * len(below) + upper * len(above)) / len(both), both))
    found = [0.0] * len(places)
    for middle, row in rows:
        for order, index in enumerate(row):
            found[index] = middle + gap * (order - (len(row) - 1) / 2)
    return found
