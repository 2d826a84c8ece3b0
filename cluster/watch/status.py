"""`musketeers status`: a run seen from outside, live, on any machine that sees its folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.watch import statusfile
from cluster.watch.live import Frame, Pace, Plan
from cluster.watch.logs import Follower
from cluster.watch.panels import COLOURS, DASH, DIM, duration

SILENT_S = 15.0  # a driver that lives says something every other second
OVER = ("finished", "stopped", "failed")
LOOKS = {"working": f"bold {COLOURS[0]}", "idle": DIM, "starting": "bold yellow"}
TALLEST = 30


class RunStatus:
    """A run's display, brought up to date by `look`.

    folder: the run's.
    experts, steps: from its configuration.  The tasks are those that its steps have trained.
    """

    def __init__(self, folder: Path, experts: Sequence[str], steps: int) -> None:
        self.folder, self.experts, self.steps = folder, tuple(experts), steps
        self._log = Follower(folder / "metrics.jsonl")
        self._records: list[dict[str, Any]] = []
        self._moment: dict[str, Any] = {}
        self._frame = self._fresh()

    def look(self) -> None:
        """Takes in what is new in the run's folder."""
        fresh, cut = self._log.read()
        if cut:  # a resume writes the steps after its checkpoint again
            self._records = []
        self._records += fresh
        if cut or tasks_of(fresh) - set(self._frame.plan.tasks):
            self._frame = self._fresh()
        else:
            for record in fresh:
                self._frame.add(record)
        self._moment = statusfile.read(self.folder)

    @property
    def over(self) -> bool:
        """Whether the run has ended, as far as its folder tells."""
        return self._moment.get("phase") in OVER

    def _fresh(self) -> Frame:
        plan = Plan(
            name=self.folder.name,
            total_steps=self.steps,
            tasks=tuple(sorted(tasks_of(self._records))),
            experts=self.experts,
            history=self._records,
        )
        return Frame(plan, Pace(time.monotonic))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The run's display, with its workers below."""
        workers = Panel(
            Group(self._line(), workers_table(self._moment.get("workers", []), options.max_width - 4)),
            title=Text("workers", style="bold"), title_align="left", border_style=DIM, padding=(0, 1),
        )  # fmt: skip
        below = console.render_lines(workers, options.update(height=None))
        height = max(14, min(TALLEST, console.height - len(below) - 1))
        yield from console.render(self._frame.layout(options.max_width, height), options.update(height=height))
        yield workers

    def _line(self) -> Text:
        """What the run is at, and how its queues are."""
        m = self._moment
        if not m:
            return Text("no news of the run yet", style=DIM)
        age = time.time() - m["time"]
        if m["phase"] == statusfile.STARTING:
            return Text.assemble((m["phase"], "bold"), (f", {duration(age)} ago", DIM))
        if not self.over and age > SILENT_S:
            return Text(f"no news for {duration(age)}: the driver is gone, or cannot write here", style="bold red")
        text = Text.assemble((m["phase"], "bold"), (f"   prompts under way {m['running']}", DIM))
        text.append(f" (oldest {m['oldest_running_s']:.0f} s)   groups that wait {m['waiting']}", DIM)
        text.append(f" (oldest {m['oldest_waiting_s']:.0f} s)   restarts {m['restarts']}", DIM)
        if m["dead"]:
            text.append(f"   prompts given up {m['dead']}", "bold red")
        return text


def tasks_of(records: Sequence[Mapping[str, Any]]) -> set[str]:
    """Tasks that have a reward of their own."""
    names = {name for record in records for name in record if name.startswith("reward/")}
    return {name.removeprefix("reward/") for name in names} - {"mean", "std"}


def workers_table(workers: Sequence[Mapping[str, Any]], width: int) -> Table:
    """Each worker with its state, side by side where there is room."""
    columns = max(1, width // 64)
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(columns):
        table.add_column(no_wrap=True, overflow="ellipsis")
    cells = [_worker(worker) for worker in workers]
    for at in range(0, len(cells), columns):
        table.add_row(*cells[at : at + columns])
    return table


def _worker(worker: Mapping[str, Any]) -> Text:
    state = worker["state"]
    since = f" {duration(worker['since_s'])}" if state != "idle" else ""
    text = Text.assemble((f"{worker['name']:<30.30} ", ""), (f"{state}{since}", LOOKS.get(state, "")))
    if worker["calls"] > 1:
        text.append(f"  {worker['calls']} calls", DIM)
    if worker["restarts"]:
        text.append(f"  {worker['restarts']} restarts", "yellow")
    text.append(f"  {worker['node'] or DASH}", DIM)
    return text


def show(status: RunStatus, console: Console, once: bool, every_s: float = 1.0) -> None:
    """Shows a run until it is over or Ctrl-C is pressed; one picture where nothing can be redrawn."""
    status.look()
    if once or not console.is_terminal:
        console.print(status)
        return
    try:
        with Live(status, console=console, refresh_per_second=2, screen=False) as live:
            while not status.over:
                time.sleep(every_s)
                status.look()
                live.refresh()
    except KeyboardInterrupt:
        return
