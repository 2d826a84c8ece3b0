"""What a person sees while a run trains: a live display on a terminal, short lines everywhere else."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.watch import panels
from cluster.watch.panels import DIM
from cluster.watch.series import History, Record, as_step

_SMALLEST = (70, 20)
_TALLEST = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is about to do.

    name: the run's name.  total_steps: the step it ends at.
    history: records of the steps before a resume, so that the curves begin at the beginning.
    """

    name: str
    total_steps: int
    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    history: Sequence[Record] = ()


class Watch(Protocol):
    """Follows a run.  `start` comes first, `stop` last and at any time, also twice."""

    def start(self, plan: Plan) -> None:
        """Show what is about to run."""

    def step(self, record: Record) -> None:
        """Show one finished step; any metric may be missing from its record."""

    def note(self, text: str) -> None:
        """Tell the person something that should stay readable after the run."""

    def stop(self) -> None:
        """Show the last state and give the terminal back."""


def make_watch(console: Console) -> Watch:
    """The live display on a terminal that can show it, plain lines otherwise."""
    wide, tall = console.width >= _SMALLEST[0], console.height >= _SMALLEST[1]
    capable = console.is_terminal and not console.is_dumb_terminal and not console.options.ascii_only
    return LiveWatch(console) if capable and wide and tall else PlainWatch(console)


class Pace:
    """Estimates the time left from when the last steps arrived."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=32)

    def begin(self, step: int) -> None:
        """Measure from here: `step` is done now."""
        self._arrivals.append((step, self._clock()))

    def left(self, total: int) -> float | None:
        """Seconds until step `total`, None before a step has been timed."""
        (first, begun), (last, ended) = self._arrivals[0], self._arrivals[-1]
        if last <= first:
            return None
        due = (total - last) * (ended - begun) / (last - first)
        return max(0.0, due - (self._clock() - ended))


class LiveWatch:
    """A full-width display that is redrawn in place; notes scroll by above it."""

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._lock = threading.Lock()  # rich redraws from a thread of its own
        self._frame = Frame(Plan(name="", total_steps=0, tasks=(), experts=()), Pace(clock))
        self._clock = clock
        self._live: Live | None = None

    def start(self, plan: Plan) -> None:
        """Begin to draw."""
        self._frame = Frame(plan, Pace(self._clock))
        self._live = Live(console=self._console, refresh_per_second=2, get_renderable=lambda: self)
        self._live.start()

    def step(self, record: Record) -> None:
        """Take in one step; it is shown at the next redraw."""
        with self._lock:
            self._frame.add(record)

    def note(self, text: str) -> None:
        """Print above the display, and keep the newest note in its last line."""
        with self._lock:
            self._frame.note = text
        self._console.print(Text(text))

    def stop(self) -> None:
        """Draw the last state, which stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the current state at the console's current size."""
        with self._lock:
            height = min(_TALLEST, console.height)
            yield from console.render(self._frame.layout(options.max_width, height), options.update(height=height))


class Frame:
    """The display's state and its arrangement on the screen."""

    def __init__(self, plan: Plan, pace: Pace) -> None:
        self.plan, self.pace, self.note = plan, pace, ""
        self.history = History(plan.history)
        self.pace.begin(self.history.step)

    def add(self, record: Record) -> None:
        self.history.add(record)
        self.pace.begin(self.history.step)

    def layout(self, width: int, height: int) -> Layout:
        """Header on top, reward and signals in the middle, attention and stage times below, a note last."""
        tasks, experts = self.plan.tasks, self.plan.experts
        below = min(max(8, len(tasks) + 3), max(8, height // 2 - 2))
        right = 40 if width >= 96 else 28
        half = width // 2
        page, middle, bottom = Layout(), Layout(), Layout(size=below)
        trend = max(0, right - 28)
        reward = _boxed(panels.RewardPanel(self.history, tasks), "reward, smoothed")
        signals = _boxed(panels.signals(self.history, trend=trend), "signals")
        middle.split_row(Layout(reward), Layout(signals, size=right))
        table = panels.attention(self.history, tasks, experts, width=half - 4, height=below - 2)
        stages = Group(panels.stages(self.history, width=width - half - 4), panels.throughput(self.history))
        step = panels.seconds(self.history.latest("time/step_s"))
        bottom.split_row(
            Layout(_boxed(table, "attention on the experts"), size=half),
            Layout(_boxed(stages, f"a step: {step}")),
        )
        last = Layout(Text(self.note or " ", style=DIM, no_wrap=True, overflow="ellipsis"), size=1)
        page.split_column(Layout(self._header(), size=2), middle, bottom, last)
        return page

    def _header(self) -> Group:
        step, total = self.history.step, self.plan.total_steps
        title = Table.grid(expand=True)
        title.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        title.add_column(justify="right", no_wrap=True)
        name = Text.assemble(("n-Musketeers ", "bold #4cc9f0"), (self.plan.name, "bold"))
        title.add_row(name, panels.router_state(self.history))
        line = Table.grid(expand=True, padding=(0, 1, 0, 0))
        for _ in range(2):
            line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=max(1, total), completed=step, complete_style="#4cc9f0", finished_style="#4ade80")
        left = Text.assemble((panels.duration(self.pace.left(total)), "bold"), (" left", DIM))
        line.add_row(Text(f"step {step}/{total}"), panels.percent(step / max(1, total)), bar, left)
        return Group(title, line)


def _boxed(content: RenderableType, title: str) -> Panel:
    return Panel(content, title=Text(title, style="bold"), title_align="left", border_style=DIM, padding=(0, 1))


class PlainWatch:
    """One line every few steps or seconds, whichever comes first: for logs, pipes and small terminals."""

    def __init__(
        self,
        console: Console,
        *,
        every_steps: int = 10,
        every_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._clock = console, clock
        self._every_steps, self._every_seconds = every_steps, every_seconds
        self._plan = Plan(name="", total_steps=0, tasks=(), experts=())
        self._history, self._pace = History(), Pace(clock)
        self._shown = (0, clock())

    def start(self, plan: Plan) -> None:
        """Print what is about to run."""
        self._plan, self._history, self._pace = plan, History(plan.history), Pace(self._clock)
        self._pace.begin(self._history.step)
        self._shown = (self._history.step, self._clock())
        tasks, experts = ", ".join(plan.tasks), ", ".join(plan.experts)
        self._print(f"{plan.name}: {plan.total_steps} steps; tasks: {tasks}; experts: {experts} (rewards are smoothed)")

    def step(self, record: Record) -> None:
        """Print the step if it is the first or a line is due."""
        first = not self._history.last
        self._history.add(record)
        self._pace.begin(self._history.step)
        step, now = self._history.step, self._clock()
        due = step - self._shown[0] >= self._every_steps or now - self._shown[1] >= self._every_seconds
        if first or due:
            self._show()

    def note(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def stop(self) -> None:
        """Print the last step if no line has shown it yet."""
        if self._shown[0] < as_step(self._history.last):
            self._show()

    def _show(self) -> None:
        history, total = self._history, self._plan.total_steps
        self._shown = (history.step, self._clock())
        tasks = " ".join(f"{task} {panels.number(history.smoothed(f'reward/{task}'))}" for task in self._plan.tasks)
        self._print(
            f"step {history.step}/{total}"
            f"  reward {panels.number(history.smoothed('reward/mean'))} ({tasks})"
            f"  kl {panels.number(history.known('policy/kl'))}"
            f"  no signal {panels.percent(history.latest('groups/no_signal'))}"
            f"  staleness {panels.number(history.latest('staleness/mean'))}"
            f"  {panels.seconds(history.latest('time/step_s'))}/step"
            f"  {panels.duration(self._pace.left(total))} left"
        )

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True, highlight=False)
