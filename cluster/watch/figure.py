"""A run in one picture: reward, attention and held-out accuracy, 16 x 5 inches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.watch.results import MEAN, ORACLE, ROUTER, Evaluation, accuracy, headline_column, interval, label
from cluster.watch.series import History, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_INK, _FAINT, _BAR, _ACCENT = "#1f2933", "#9aa5b1", "#cbd2d9", "#0b84c6"
COLOURS = ("#0b84c6", "#e8830c", "#7c5cd6", "#1f9d57", "#d64562", "#b8860b", "#3b6fd1", "#b23bb2")
_MOST_STRIPS = 5
STYLE: Mapping[str, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#edf0f3",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


@contextlib.contextmanager
def drawn(path: Path, width: float, height: float, dpi: int = 110, **style: object) -> Iterator[Figure]:
    """A figure of so many inches in the house's style, written as a PNG when the block ends well."""
    # matplotlib is slow to import and only the end of a run draws.  Without pyplot nothing is global.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(dict(STYLE) | style):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        # No software version in the file: the same run gives the same bytes.
        figure.savefig(path, dpi=dpi, metadata={"Software": None})


def training_figure(metrics: Sequence[Record], evaluation: Evaluation, path: Path) -> None:
    """Write the figure as a PNG.

    metrics: the run's step records.  Left: reward per task, raw and smoothed.  Middle: attention per task and
    expert, or its entropy where there are too many tasks.  Right: held-out accuracy by system with 95 %
    intervals, on the composed task if there is one, else on the mean over tasks.
    """
    history = History(metrics)
    with drawn(path, 16, 5, dpi=150) as figure:
        left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=(1, 1, 1.25))[0]
        _draw_reward(left.subplots(), history, names(metrics, "reward/", exclude=("mean", "std")))
        _draw_attention(middle, history, names(metrics, "attention/"))
        _draw_accuracy(right.subplots(), evaluation)


def names(metrics: Sequence[Record], prefix: str, *, exclude: Sequence[str] = ()) -> list[str]:
    """What follows a prefix in the metrics' names, in order of appearance."""
    found = dict.fromkeys(name.removeprefix(prefix) for record in metrics for name in record if name.startswith(prefix))
    return [name for name in found if name not in exclude]


def _draw_reward(axes: Axes, history: History, tasks: Sequence[str]) -> None:
    for index, task in enumerate(tasks or ["mean"]):
        series, colour = history.series(f"reward/{task}"), COLOURS[index % len(COLOURS)]
        axes.plot(series.steps, series.values, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(series.steps, series.smoothed, color=colour, linewidth=2.2, label=task)
    axes.set(title="Training reward", xlabel="step", ylim=(0, None))
    axes.set_xlim(left=0)
    axes.legend(loc="best", handlelength=1.8)


def _draw_attention(area: SubFigure, history: History, pairs: Sequence[str]) -> None:
    """One strip per task, in which the experts' shares stack up to one."""
    tasks = list(dict.fromkeys(pair.rpartition("/")[0] for pair in pairs))
    experts = list(dict.fromkeys(pair.rpartition("/")[2] for pair in pairs))
    if not 1 <= len(tasks) <= _MOST_STRIPS:
        _draw_entropy(area.subplots(), history, len(experts))
        return
    # As in the panel beside it where an expert is named after a task.
    places = [tasks.index(expert) if expert in tasks else len(tasks) + at for at, expert in enumerate(experts)]
    colours = [COLOURS[place % len(COLOURS)] for place in places]
    strips = area.subplots(len(tasks), 1, sharex=True, squeeze=False)[:, 0]
    for axes, task in zip(strips, tasks, strict=True):
        curves = [history.series(f"attention/{task}/{expert}") for expert in experts]
        steps = max((curve.steps for curve in curves), key=len)
        shares = [
            np.interp(steps, curve.steps, curve.smoothed) if curve.steps else np.zeros(len(steps)) for curve in curves
        ]
        axes.stackplot(steps, shares, colors=colours, labels=experts, alpha=0.85, linewidth=0)
        axes.set(ylim=(0, 1), yticks=(0, 0.5, 1))
        axes.margins(x=0)
        axes.annotate(
            f"on {task}",
            (0, 1),
            (6, -6),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            color="white",
            weight="bold",
            size=10,
        )
    strips[0].set_title("Attention")
    strips[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, handlelength=1, borderaxespad=0.3)
    strips[-1].set_xlabel("step")


def _draw_entropy(axes: Axes, history: History, experts: int) -> None:
    entropy = history.series("router/attention_entropy")
    axes.plot(entropy.steps, entropy.smoothed, color=_ACCENT, linewidth=2.2, label="attention entropy")
    if experts:
        axes.axhline(math.log(experts), color=_FAINT, linestyle="--", linewidth=1.2, label="all experts alike")
    axes.set(title="Attention entropy (nats)", xlabel="step", ylim=(0, None))
    axes.set_xlim(left=0)
    axes.legend(loc="best", handlelength=1.8)


def _draw_accuracy(axes: Axes, evaluation: Evaluation) -> None:
    column = headline_column(evaluation)
    shown = {name: result for name, result in evaluation.items() if accuracy(result, column) is not None}
    highest = 0.0
    for place, (system, result) in enumerate(shown.items()):
        value, bounds = accuracy(result, column), interval(result, column)
        if value is None or bounds is None:
            continue
        colour = _ACCENT if system == ROUTER else "white" if system == ORACLE else _BAR
        axes.barh(place, value, height=0.66, color=colour, edgecolor=_FAINT if system == ORACLE else colour)
        reach = [[max(0.0, value - bounds.low)], [max(0.0, bounds.high - value)]]
        axes.errorbar(value, place, xerr=reach, color=_INK, linewidth=1.2, capsize=3)
        weight = "bold" if system == ROUTER else "normal"
        axes.annotate(
            f"{value:.1%}", (bounds.high, place), (6, 0), textcoords="offset points", va="center", weight=weight
        )
        highest = max(highest, bounds.high)
    axes.set_yticks(range(len(shown)), [label(system) for system in shown])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, min(1.0, highest) * 1.15 or 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    where = "mean over tasks" if column == MEAN else f"{column} task"
    axes.set(title=f"Held-out accuracy, {where}", xlabel="lines: 95 % intervals")
