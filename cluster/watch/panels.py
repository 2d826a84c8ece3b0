"""The parts of the live display: each turns a run's history into something rich can draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from cluster.watch.chart import Chart, Curve, bar, sparkline
from cluster.watch.series import History

DASH = "–"
DIM = "bright_black"
COLOURS = ("#4cc9f0", "#f9a826", "#a78bfa", "#4ade80", "#fb7185", "#facc15", "#60a5fa", "#e879f9")
STAGES = ("encode", "rollout", "reward", "learner")

_SIGNALS = (
    ("KL to policy", "policy/kl", "number"),
    ("entropy", "policy/entropy", "number"),
    ("no signal", "groups/no_signal", "percent"),
    ("clipped", "policy/clip_fraction", "percent"),
    ("truncated", "policy/truncated_fraction", "percent"),
    ("masked rewards", "rewards/masked_fraction", "percent"),
    ("log-prob gap", "policy/logprob_mismatch", "number"),
    ("gradient norm", "router/grad_norm", "number"),
    ("prefix / token", "router/prefix_rms_ratio", "number"),
    ("attn. entropy", "router/attention_entropy", "number"),
)


@dataclass(frozen=True, slots=True)
class RewardPanel:
    """Smoothed reward per task over all steps, with the current values as its legend."""

    history: History
    tasks: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the legend, then the chart in what is left of the height."""
        legend = self._legend(options.max_width)
        yield from legend
        height = max(3, (options.height or 12) - len(legend))
        yield from Chart(self._curves()).rows(options.max_width, height)

    def _curves(self) -> list[Curve]:
        named = [(self.history.series(f"reward/{task}"), colour(index)) for index, task in enumerate(self.tasks)]
        drawn = [(series, style) for series, style in named if series.steps]
        drawn = drawn or [(self.history.series("reward/mean"), "bold")]
        return [Curve(series.steps, series.smoothed, style) for series, style in drawn]

    def _legend(self, width: int) -> list[Text]:
        """Entries side by side, on at most three lines."""
        deviation = number(self.history.latest("reward/std"))
        mean = number(self.history.smoothed("reward/mean"))
        entries = [Text.assemble(("mean ", DIM), (mean, "bold"), (f" ± {deviation}", DIM))]
        for index, task in enumerate(self.tasks):
            value = number(self.history.smoothed(f"reward/{task}"))
            entries.append(Text.assemble(("● ", colour(index)), (f"{task} ", DIM), (value, f"bold {colour(index)}")))
        lines = [Text(no_wrap=True, overflow="ellipsis")]
        for entry in entries:
            if lines[-1].cell_len and lines[-1].cell_len + 3 + entry.cell_len > width:
                lines.append(Text(no_wrap=True, overflow="ellipsis"))
            lines[-1].append("   " if lines[-1].cell_len else "").append_text(entry)
        if len(lines) > 3:
            lines[2].truncate(width - 2)
            lines[2].append(" …", DIM)
        return lines[:3]


def signals(history: History, *, trend: int) -> Table:
    """The health of training: one line per metric, with a sparkline `trend` characters wide if not 0."""
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style=DIM, no_wrap=True)
    if trend:
        table.add_column(style="#4cc9f0", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, metric, kind in _SIGNALS:
        value = history.known(metric)
        shown = percent(value) if kind == "percent" else number(value)
        curve = [sparkline(history.series(metric).smoothed, trend)] if trend else []
        table.add_row(name, *curve, shown)
    return table


def attention(history: History, tasks: Sequence[str], experts: Sequence[str], *, width: int, height: int) -> Table:
    """The share of attention each expert gets, per task; bars where the width allows."""
    name = min(16, max((len(task) for task in tasks), default=4))
    # An expert's column: a bar and a space where there is room, the number, a space to the next column.
    fitting = max(1, (width - name - 1) // 5)
    shown = list(experts[:fitting])
    # An expert named after a task has that task's colour.
    styles = [
        colour(tasks.index(expert) if expert in tasks else len(tasks) + index) for index, expert in enumerate(shown)
    ]
    bars = min(14, (width - name - 1) // max(1, len(shown)) - 6)
    table = Table.grid(padding=(0, 1, 0, 0), expand=False)
    table.add_column(style=DIM, no_wrap=True, width=name, overflow="ellipsis")
    for _ in shown:
        table.add_column(no_wrap=True, width=bars + 5 if bars >= 2 else 4, overflow="ellipsis")
    hidden = len(experts) - len(shown)
    table.add_row(
        f"+{hidden} experts" if hidden else "",
        *(Text(expert, style=style) for expert, style in zip(shown, styles, strict=True)),
    )
    rows = tasks if len(tasks) < height else tasks[: max(1, height - 2)]
    for task in rows:
        cells: list[RenderableType] = []
        for expert, style in zip(shown, styles, strict=True):
            share = history.known(f"attention/{task}/{expert}")
            drawn = f"{bar(share or 0.0, bars)} " if bars >= 2 else ""
            cells.append(Text.assemble((drawn, style), DASH if share is None else f"{share:.2f}"))
        table.add_row(task, *cells)
    if len(rows) < len(tasks):
        table.add_row(f"+{len(tasks) - len(rows)} tasks")
    return table


def stages(history: History, *, width: int) -> Table:
    """Where a step's time goes.  A stage is busy for its share of the step and idle for the rest."""
    step = history.latest("time/step_s")
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style=DIM, no_wrap=True)
    table.add_column(justify="right", no_wrap=True, width=7)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True, width=5)
    table.add_column(style=DIM, no_wrap=True)
    room = max(4, min(24, width - 34))
    times = {stage: history.latest(f"time/{stage}_s") for stage in STAGES}
    if step is not None:
        # What no stage accounts for: waiting, bookkeeping.  Nothing is left where stages overlap.
        times["other"] = max(0.0, step - sum(time or 0.0 for time in times.values()))
    for stage in (*STAGES, "other"):
        time = times.get(stage)
        share = None if time is None or not step else time / step
        drawn = Text(bar(share or 0.0, room), style=DIM if stage == "other" else COLOURS[0])
        idle = "" if stage == "other" else f"idle {percent(history.latest(f'idle/{stage}'))}"
        table.add_row(stage, seconds(time), drawn, percent(share), idle)
    return table


def throughput(history: History) -> Text:
    """Tokens per second and the share of features that came from the cache, on one line."""
    tokens = history.latest("rollout/tokens_per_second")
    return Text.assemble(
        (DASH if tokens is None else f"{tokens:,.0f}", "bold"),
        (" tokens/s   cache hits ", DIM),
        (percent(history.latest("cache/hit_rate")), "bold"),
        no_wrap=True,
    )


def router_state(history: History) -> Text:
    """The router's version and how far behind the trained groups were."""
    version, staleness = history.latest("router/version"), history.latest("staleness/mean")
    oldest = history.latest("staleness/max")
    return Text.assemble(
        ("router ", DIM),
        DASH if version is None else f"v{version:.0f}",
        ("   staleness ", DIM),
        DASH if staleness is None else f"{staleness:.1f}",
        (f" (max {DASH if oldest is None else f'{oldest:.0f}'})", DIM),
        no_wrap=True,
    )


def colour(index: int) -> str:
    """The style of the task or expert at this position."""
    return COLOURS[index % len(COLOURS)]


def number(value: float | None) -> str:
    """A value in about three digits."""
    if value is None:
        return DASH
    size = abs(value)
    if size >= 1000 or 0 < size < 0.0005:
        return f"{value:.1e}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3f}"


def percent(share: float | None) -> str:
    """A share of 0 to 1 as a percentage."""
    return DASH if share is None else f"{share:.0%}"


def seconds(value: float | None) -> str:
    """A short time, such as one stage of a step."""
    if value is None:
        return DASH
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def duration(value: float | None) -> str:
    """A long time, such as what is left of a run, as hours, minutes and seconds."""
    if value is None:
        return DASH
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
