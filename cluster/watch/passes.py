"""pass@k: how likely at least one of k sampled answers is right (Chen et al., arXiv 2107.03374)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from cluster.watch.comparison import Cell, crossed
from cluster.watch.results import MEAN

Rates = dict[str, dict[str, dict[str, float]]]


def pass_at(k: int, right: int, samples: int) -> float:
    """The unbiased estimate from `right` of `samples` answers: 1 - C(samples - right, k) / C(samples, k)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def pass_rates(right: Mapping[str, Sequence[int]], samples: int) -> Rates:
    """By k (1, 2, 4, ... up to the number of samples) and task, and the mean over tasks, with 95 % over prompts.

    right: per task, how many of the sampled answers to each prompt are.
    """
    found: Rates = {}
    for k in [2**power for power in range(samples.bit_length()) if 2**power <= samples]:
        estimates = {task: [pass_at(k, count, samples) for count in counts] for task, counts in right.items()}
        cells = {task: crossed([estimates], task) for task in [*estimates, MEAN]}
        found[str(k)] = {task: _plain(cell) for task, cell in cells.items()}
    return found


def table(rates: Mapping[str, Any], temperature: float, samples: int) -> Table:
    """For the terminal."""
    shown = Table("", title=f"{samples} answers a prompt sampled at temperature {temperature:g}, % [95 % over prompts]")
    for task in next(iter(rates.values())):
        shown.add_column(task, justify="right")
    for k, cells in rates.items():
        shown.add_row(f"pass@{k}", *(Cell(**cell).text for cell in cells.values()))
    return shown


def _plain(cell: Cell) -> dict[str, float]:
    return {"value": cell.value, "low": cell.low, "high": cell.high}
