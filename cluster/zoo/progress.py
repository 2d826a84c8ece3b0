"""Progress of a build: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LINE_EVERY_S = 20.0


class Progress:
    """One line of progress a model."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.console = Console(stderr=True, quiet=not shown)
        self.bars: Bars | None = None
        if shown and self.console.is_terminal:
            columns = (
                TextColumn("{task.description:>14}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
            )
            self.bars = Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self._rows: dict[str, TaskID] = {}
        self._steps: dict[str, int] = {}
        self._next: dict[str, float] = {}

    def __enter__(self) -> Progress:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars:
            self.bars.stop()

    def add(self, name: str, steps: int) -> None:
        """Announces a model."""
        self._steps[name] = steps
        if self.bars:
            self._rows[name] = self.bars.add_task(name, total=steps, loss="-", start=False)

    def step(self, name: str, step: int, loss: float) -> None:
        """A model has done a training step."""
        if self.bars:
            if step and not self.bars.tasks[self._rows[name]].started:
                self.bars.start_task(self._rows[name])
            self.bars.update(self._rows[name], completed=step, loss=f"{loss:.3f}")
        elif time.monotonic() >= self._next.get(name, 0.0):
            self._next[name] = time.monotonic() + LINE_EVERY_S
            self._line(f"zoo: {name} step {step} of {self._steps[name]}, loss {loss:.3f}")

    def done(self, name: str) -> None:
        """A model is trained, saved and measured."""
        if self.bars and name in self._rows:
            self.bars.update(self._rows[name], completed=self._steps[name])
            self.bars.stop_task(self._rows[name])
        elif name in self._steps:
            self._line(f"zoo: {name} done")

    def note(self, text: str) -> None:
        """Something else is under way."""
        if self.bars:
            self.bars.console.print(text)
        else:
            self._line(f"zoo: {text}")

    def _line(self, text: str) -> None:
        if self.shown:
            print(text, file=sys.stderr, flush=True)
