"""What a run's held-out evaluation says: the systems compared, and one honest verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NotRequired, TypedDict

from cluster.watch.intervals import (
    Accuracy,
    Interval,
    beats_the_best_of,
    newcombe,
    paired_bootstrap,
    wilson,
    wilson_mean,
)

MEAN = "mean"
COMPOSED = "composed"
ROUTER = "router"
SHUFFLED_WITHIN_TASK = "shuffled_within_task"
ORACLE = "oracle_route"
TEXT = "text"
EXPERT = "experts/"

LABELS = {
    ROUTER: "router",
    SHUFFLED_WITHIN_TASK: "features shuffled in task",
    "shuffled": "features shuffled",
    "frozen_policy": "frozen policy alone",
    "majority": "experts' majority",
    "route_and_answer": "route and answer",
    ORACLE: "oracle route, hindsight",
    TEXT: "experts' answers as text",
}


class Result(TypedDict):
    """One system on the held-out prompts.

    tasks: accuracy per task.  mean: their unweighted mean.  prompts: how many prompts per task.
    outcomes: per task 0 or 1 per prompt, in an order shared by all systems; makes intervals paired.
    """

    tasks: dict[str, float]
    mean: float
    prompts: dict[str, int]
    outcomes: NotRequired[dict[str, list[int]]]


Evaluation = Mapping[str, Result]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The router against the best baseline on one column (a task, or the mean over tasks).

    difference: router - baseline, with its 95 % interval from `low` to `high`.
    paired: whether the interval comes from prompt-by-prompt outcomes.
    rivals: how many the baseline was picked from, for being the best.
    """

    column: str
    baseline: str
    router_accuracy: float
    baseline_accuracy: float
    difference: float
    low: float
    high: float
    paired: bool
    rivals: int = 1

    @property
    def lost(self) -> bool:
        """Whether the baseline is shown to be better."""
        return beats_the_best_of(self.rivals, self.difference, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The router against the best baseline: the headline numbers, and all of it as one line of text.

    won: the whole interval lies above zero.
    hindsight: what choosing the best expert per prompt would reach, which no system can do, and what the experts'
        answers as text do, if evaluated.
    """

    text: str
    difference: float
    low: float
    high: float
    won: bool
    hindsight: str
    comparisons: tuple[Comparison, ...]

    def summary(self) -> dict[str, Any]:
        """As plain data, for `summary.json`."""
        return asdict(self) | {"comparisons": [asdict(comparison) for comparison in self.comparisons]}


def label(system: str) -> str:
    """A system's name for people."""
    return f"expert {system.removeprefix(EXPERT)}" if system.startswith(EXPERT) else LABELS.get(system, system)


def is_baseline(system: str) -> bool:
    """Whether the router has to beat this system.

    The oracle knows the answers and does not count; neither does collaboration by text, where experts decode.
    """
    return system in ("frozen_policy", "majority", "route_and_answer") or system.startswith(EXPERT)


def tasks_of(evaluation: Evaluation) -> list[str]:
    """The evaluated tasks, the composed one first."""
    tasks = list(dict.fromkeys(task for result in evaluation.values() for task in result["tasks"]))
    return sorted(tasks, key=lambda task: task != COMPOSED)


def headline_column(evaluation: Evaluation) -> str:
    """The column that decides: the composed task, which no expert can answer alone, or else the mean."""
    return COMPOSED if COMPOSED in tasks_of(evaluation) else MEAN


def accuracy(result: Result, column: str) -> float | None:
    """One cell of the results, None where a system was not evaluated on the task."""
    return result["mean"] if column == MEAN else result["tasks"].get(column)


def interval(result: Result, column: str) -> Interval | None:
    """The cell's 95 % interval, None where a system was not evaluated on the task."""
    if column == MEAN:
        return wilson_mean([_accuracy(result, task) for task in result["tasks"]])
    return wilson(_accuracy(result, column)) if column in result["tasks"] else None


def best_baseline(evaluation: Evaluation, column: str) -> str:
    """The most accurate baseline on a column; the first of equals.

    Raises:
        ValueError: when no baseline was evaluated on it (for the mean: on all tasks of the router).
    """
    known = _rivals(evaluation, column)
    if not known:
        raise ValueError(f"no baseline was evaluated on {column}: there is nothing to compare the router with")
    return max(known, key=lambda name: known[name])


def _rivals(evaluation: Evaluation, column: str) -> dict[str, float]:
    """Baselines that were evaluated on a column, and how they did."""
    needed = set(evaluation[ROUTER]["tasks"]) if column == MEAN else {column}
    return {
        name: accuracy(result, column) or 0.0
        for name, result in evaluation.items()
        if is_baseline(name) and needed <= set(result["tasks"])
    }


def compare(evaluation: Evaluation, baseline: str, column: str) -> Comparison:
    """The router against one other system on one column."""
    router, other = evaluation[ROUTER], evaluation[baseline]
    tasks = list(router["tasks"]) if column == MEAN else [column]
    one, two = _outcomes(router, tasks), _outcomes(other, tasks)
    paired = one is not None and two is not None
    if one is not None and two is not None:
        bounds = paired_bootstrap(one, two)
    else:
        bounds = newcombe([_accuracy(router, task) for task in tasks], [_accuracy(other, task) for task in tasks])
    mine, theirs = accuracy(router, column) or 0.0, accuracy(other, column) or 0.0
    return Comparison(
        column=column,
        baseline=baseline,
        router_accuracy=mine,
        baseline_accuracy=theirs,
        difference=mine - theirs,
        low=bounds.low,
        high=bounds.high,
        paired=paired,
    )


def verdict(evaluation: Evaluation) -> Verdict:
    """The router against the best baseline, on the composed task if there is one and on the mean.

    Raises:
        ValueError: when the router or every baseline is missing.
    """
    if ROUTER not in evaluation:
        raise ValueError(f"the evaluation has no router, only {', '.join(evaluation)}")
    columns = dict.fromkeys((headline_column(evaluation), MEAN))
    comparisons = tuple(
        replace(compare(evaluation, best_baseline(evaluation, column), column), rivals=len(_rivals(evaluation, column)))
        for column in columns
    )
    head = comparisons[0]
    text = "; ".join([_sentence(head), *(_clause(other) for other in comparisons[1:])])
    return Verdict(
        text=f"{text}{_warning(evaluation, head)}.",
        difference=head.difference,
        low=head.low,
        high=head.high,
        won=head.low > 0,
        hindsight=_hindsight(evaluation, head.column),
        comparisons=comparisons,
    )


def _sentence(result: Comparison) -> str:
    where = "on the mean over tasks" if result.column == MEAN else f"on {result.column}"
    against = (
        f"{where} the router answers {result.router_accuracy:.1%}, "
        f"the best baseline ({label(result.baseline)}) {result.baseline_accuracy:.1%}: {_points(result)}"
    )
    if result.low > 0:
        return f"Collaboration wins: {against}"
    if result.lost:
        return f"On this mixture {_winner(result.baseline)} wins: {against}"
    return f"No difference shown: {against}"


def _clause(result: Comparison) -> str:
    if result.low > 0:
        outcome = f"the router also beats {label(result.baseline)}"
    elif result.lost:
        outcome = f"{_winner(result.baseline)} wins ({label(result.baseline)})"
    else:
        outcome = f"no difference to {label(result.baseline)} is shown"
    return f"on the mean over tasks {outcome}, {_points(result)}"


def _winner(baseline: str) -> str:
    if baseline.startswith(EXPERT):
        return "a single expert"
    return {"route_and_answer": "routing", "majority": "the majority"}.get(baseline, "the policy alone")


def _points(result: Comparison) -> str:
    low, high = 100 * result.low, 100 * result.high
    return f"{100 * result.difference:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _warning(evaluation: Evaluation, head: Comparison) -> str:
    """A win that other prompts' features would win as well does not come from what the experts read."""
    if head.low <= 0 or SHUFFLED_WITHIN_TASK not in evaluation:
        return ""
    control = compare(evaluation, SHUFFLED_WITHIN_TASK, head.column)
    if control.low > 0:
        return ""
    return f"; but features of other prompts do as well ({_points(control)}), so the gain is not what the experts read"


def _hindsight(evaluation: Evaluation, column: str) -> str:
    where = "on the mean over tasks" if column == MEAN else f"on {column}"
    systems = {
        ORACLE: "With hindsight, the best expert for each prompt would reach",
        TEXT: "With the experts' answers decoded into its prompt as text, the policy reaches",
    }
    found = [(said, accuracy(evaluation[name], column)) for name, said in systems.items() if name in evaluation]
    return " ".join(f"{said} {score:.1%} {where}." for said, score in found if score is not None)


def _accuracy(result: Result, task: str) -> Accuracy:
    return Accuracy(result["tasks"][task], result["prompts"][task])


def _outcomes(result: Result, tasks: Sequence[str]) -> list[list[int]] | None:
    outcomes = result.get("outcomes", {})
    return [outcomes[task] for task in tasks] if all(task in outcomes for task in tasks) else None
