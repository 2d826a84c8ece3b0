"""What interventions cost a router, per task and expert, beside its attention; and whether attention foretells it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from cluster.watch.intervals import paired_bootstrap

KNOCKED_OUT, STOOD_IN = "knocked out", "knocked out, with a stand-in"
SHUFFLED, MEAN_STATES = "states shuffled", "states replaced by their mean"
FROZEN = "prefix frozen"
PERMUTATIONS = 2_000
FEWEST = 10  # prompts, below which no correlation is told


@dataclass(frozen=True)
class Ablated:
    """Answers under an intervention: 1 where right, one a prompt.  expert: that it was done to, if to one."""

    what: str
    expert: str | None
    outcomes: Sequence[int]


@dataclass(frozen=True)
class Loss:
    """Accuracy that an intervention costs on a task, with its 95 % interval over prompts.

    attention: the expert's mean share of the task's prompts.
    """

    what: str
    expert: str | None
    task: str
    loss: float
    low: float
    high: float
    attention: float | None


@dataclass(frozen=True)
class Foretold:
    """Spearman's rho between attention and loss, over `count` pairs; None where it is undefined.

    p: how often as much would come by chance; None where pairs are too few, or depend on each other.
    """

    rho: float | None
    p: float | None
    count: int


@dataclass(frozen=True)
class Ablation:
    """Everything that was measured of one router.

    tasks, full: of every prompt, its task and 1 where the router as it is was right.
    attention: (prompts, experts).
    """

    experts: tuple[str, ...]
    tasks: tuple[str, ...]
    full: Sequence[int]
    attention: np.ndarray
    ablated: tuple[Ablated, ...]

    def losses(self) -> list[Loss]:
        """One for every intervention and task."""
        found = []
        for each in self.ablated:
            for task in dict.fromkeys(self.tasks):
                rows = [row for row, mine in enumerate(self.tasks) if mine == task]
                full, ablated = [self.full[row] for row in rows], [each.outcomes[row] for row in rows]
                bounds = paired_bootstrap([full], [ablated])
                share = None
                if each.expert is not None:
                    share = float(self.attention[rows, self.experts.index(each.expert)].mean())
                value = float(np.mean(full) - np.mean(ablated))
                found.append(Loss(each.what, each.expert, task, value, bounds.low, bounds.high, share))
        return found

    def over_cells(self) -> Foretold:
        """Over tasks and experts: does the expert that is looked at most cost most?

        Without a p-value: the shares of a task add up to one, so cells are not independent.
        """
        cells = [loss for loss in self.losses() if loss.what == KNOCKED_OUT]
        attention, losses = [cell.attention or 0.0 for cell in cells], [cell.loss for cell in cells]
        return foretold([0] * len(cells), attention, losses, permutations=0)

    def over_prompts(self) -> dict[str, Foretold]:
        """By expert, over the prompts that the router got right: is one that looks more at it lost more often?

        Compared within tasks: that one task looks at an expert and needs it says nothing of single prompts.
        """
        right = np.flatnonzero(self.full)
        lost = {each.expert: each.outcomes for each in self.ablated if each.what == KNOCKED_OUT}
        tasks = [self.tasks[row] for row in right]
        return {
            expert: foretold(tasks, self.attention[right, place], [1 - lost[expert][row] for row in right])
            for place, expert in enumerate(self.experts)
        }

    def as_data(self) -> dict[str, Any]:
        """As plain data, for `ablation.json`."""
        return {
            "accuracy": _by_task(self.tasks, self.full),
            "losses": [asdict(loss) for loss in self.losses()],
            "attention_foretells": {
                "over_tasks_and_experts": asdict(self.over_cells()),
                "over_prompts": {expert: asdict(found) for expert, found in self.over_prompts().items()},
            },
        }


def foretold(
    strata: Sequence[object],
    attention: Sequence[float] | np.ndarray,
    losses: Sequence[float],
    permutations: int = PERMUTATIONS,
) -> Foretold:
    """Spearman's rank correlation within strata, where both vary, and its p-value by permuting within them.

    permutations: 0 leaves the p-value out.
    """
    from scipy.stats import rankdata

    count, rng = len(losses), np.random.default_rng(0)
    rows = [np.flatnonzero([mine == stratum for mine in strata]) for stratum in dict.fromkeys(strata)]
    pairs = []
    for mine in rows:
        ranks = [rankdata(np.asarray(values, dtype=float)[mine]) for values in (attention, losses)]
        pairs.append([rank - rank.mean() for rank in ranks])
    size = math.sqrt(math.prod(sum(float(pair[side] @ pair[side]) for pair in pairs) for side in (0, 1)))
    if count < 3 or size == 0:
        return Foretold(None, None, count)
    rho = sum(float(looked @ lost) for looked, lost in pairs) / size
    if not permutations:
        return Foretold(rho, None, count)
    shuffled = np.zeros(permutations)
    for looked, lost in pairs:
        shuffled += rng.permuted(np.tile(lost, (permutations, 1)), axis=1) @ looked / size
    as_much = int((np.abs(shuffled) >= abs(rho) - 1e-12).sum())
    return Foretold(rho, (1 + as_much) / (1 + permutations), count)


def table(ablation: Mapping[str, Any]) -> Table:
    """For the terminal, in points of accuracy.  ablation: as of `as_data`."""
    tasks = list(ablation["accuracy"])
    shown = Table("", title="accuracy lost, points [95 % over prompts]; in brackets behind it the attention")
    for task in tasks:
        shown.add_column(f"{task} ({100 * ablation['accuracy'][task]:.1f})", justify="right")
    for what, expert, mine in rows_of(ablation):
        shown.add_row(f"{expert} {what}" if expert else what, *(_cell(mine[task]) for task in tasks))
    return shown


def rows_of(ablation: Mapping[str, Any]) -> list[tuple[str, str | None, dict[str, Mapping[str, Any]]]]:
    """(intervention, expert, losses by task), in the order in which they were measured."""
    found: dict[tuple[str, str | None], dict[str, Mapping[str, Any]]] = {}
    for loss in ablation["losses"]:
        found.setdefault((loss["what"], loss["expert"]), {})[loss["task"]] = loss
    return [(what, expert, mine) for (what, expert), mine in found.items()]


def said(ablation: Mapping[str, Any]) -> list[str]:
    """Whether attention foretells what an expert's absence costs, in words."""
    foretells = ablation["attention_foretells"]
    lines = []
    cells = foretells["over_tasks_and_experts"]
    if cells["rho"] is not None:
        lines.append(
            f"over {cells['count']} pairs of task and expert, attention and loss have a rank correlation of "
            f"{cells['rho']:+.2f}"
        )
    for expert, found in foretells["over_prompts"].items():
        if found["rho"] is not None and found["count"] >= FEWEST:
            lines.append(
                f"over the {found['count']} prompts that the router got right, attention on {expert} and losing the "
                f"prompt without it, within tasks: {found['rho']:+.2f} (p = {found['p']:.2g})"
            )
    return lines or ["attention or loss does not vary: nothing can be said of how one foretells the other"]


def write(ablation: Mapping[str, Any], path: Path) -> None:
    """Writes `ablation.json`."""
    path.write_text(json.dumps(ablation, indent=1) + "\n", encoding="utf-8")


def _by_task(tasks: Sequence[str], outcomes: Sequence[int]) -> dict[str, float]:
    mine: dict[str, list[int]] = {}
    for task, outcome in zip(tasks, outcomes, strict=True):
        mine.setdefault(task, []).append(outcome)
    return {task: float(np.mean(values)) for task, values in mine.items()}


def _cell(loss: Mapping[str, Any]) -> Text:
    low, high = loss["low"], loss["high"]
    style = "red" if low > 0 else "green" if high < 0 else "bright_black"
    cell = Text(f"{100 * loss['loss']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", style=style)
    if loss["attention"] is not None:
        cell.append(f" ({loss['attention']:.2f})", style="bright_black")
    return cell
