"""The ablation in one picture: what each intervention costs each task, beside where the router looks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.watch.ablation import KNOCKED_OUT, rows_of
from cluster.watch.figure import drawn


def ablation_figure(ablation: Mapping[str, Any], path: Path) -> None:
    """Write the figure as a PNG.

    ablation: as of `Ablation.as_data`.
    """
    tasks, rows = list(ablation["accuracy"]), rows_of(ablation)
    losses = np.array([[100 * mine[task]["loss"] for task in tasks] for _, _, mine in rows])
    looked = [(expert, mine) for what, expert, mine in rows if what == KNOCKED_OUT]
    attention = np.array([[mine[task]["attention"] for task in tasks] for _, mine in looked])
    with drawn(path, 13, 1.6 + 0.42 * len(rows), **{"axes.grid": False}) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        most = max(5.0, float(np.abs(losses).max()))
        left.imshow(losses, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        left.set(title="Accuracy lost, points", xticks=range(len(tasks)), yticks=range(len(rows)))
        left.set_xticklabels([f"{task}\n{100 * ablation['accuracy'][task]:.1f} % as it is" for task in tasks])
        left.set_yticklabels([f"{expert}: {what}" if expert else what for what, expert, _ in rows])
        right.imshow(attention, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        right.set(title="Attention", xticks=range(len(tasks)), yticks=range(len(looked)))
        right.set_xticklabels(tasks)
        right.set_yticklabels([expert for expert, _ in looked])
        for axes, values, form, limit in ((left, losses, "{:+.1f}", 0.6 * most), (right, attention, "{:.2f}", 0.6)):
            for (row, column), value in np.ndenumerate(values):
                colour = "white" if abs(value) > limit else "#1f2933"
                axes.text(column, row, form.format(value), ha="center", va="center", color=colour)
