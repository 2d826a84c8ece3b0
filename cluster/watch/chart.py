"""Line charts, sparklines and bars from Unicode characters, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # braille bit at [row][column] of a 2 x 4 cell
_BRAILLE = 0x2800
_LEVELS = "▁▂▃▄▅▆▇█"
_EIGHTHS = " ▏▎▍▌▋▊▉"
_TOPS = (0.05, 0.1, 0.2, 0.25, 0.5, 0.75, 1.0)


class Curve(NamedTuple):
    """One line of a chart, in a rich style."""

    steps: list[int]
    values: list[float]
    style: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over the same steps, with axes; fills the width and height it is given.

    Where curves cross, the earlier one in the list stays visible.
    """

    curves: Sequence[Curve]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one text per row."""
        height = max(3, options.height or 10)
        yield from self.rows(options.max_width, height)

    def rows(self, width: int, height: int) -> list[Text]:
        """The chart as `height` rows of `width` characters, the last one holding the steps."""
        low, high = _span([value for curve in self.curves for value in curve.values])
        labels = _labels(low, high, height - 1)
        margin = max(len(text) for text in labels) + 2
        steps = [step for curve in self.curves for step in curve.steps[:1] + curve.steps[-1:]]
        first, last = (min(steps), max(steps)) if steps else (0, 0)
        grid = _Grid(width - margin, height - 1, (first, last), (low, high))
        for curve in reversed(self.curves):
            grid.draw(curve)
        rows = []
        for text, cells in zip(labels, grid.rows(), strict=True):
            rows.append(Text(f"{text:>{margin - 2}} {'┤' if text else '│'}", style="bright_black").append_text(cells))
        ends = (f"{first}", f"step {last}") if steps else ("", "")
        gap = " " * max(1, width - margin - len(ends[0]) - len(ends[1]))
        rows.append(Text(" " * margin + gap.join(ends), style="bright_black", no_wrap=True, overflow="crop"))
        return rows


class _Grid:
    """Braille cells, each 2 dots wide and 4 high."""

    def __init__(self, width: int, height: int, steps: tuple[int, int], values: tuple[float, float]) -> None:
        self._bits = np.zeros((height, max(1, width)), dtype=int)
        self._styles = np.zeros(self._bits.shape, dtype=object)
        self._steps, (self._low, self._high) = steps, values

    def draw(self, curve: Curve) -> None:
        if not curve.steps:
            return
        rows, columns = self._bits.shape
        at = np.linspace(*self._steps, num=2 * columns)
        levels = (np.interp(at, curve.steps, curve.values) - self._low) / (self._high - self._low)
        dots = np.rint((1 - np.clip(levels, 0, 1)) * (4 * rows - 1)).astype(int)
        reached = np.flatnonzero((at >= curve.steps[0]) & (at <= curve.steps[-1]))
        before = None
        for column in reached.tolist() or [2 * columns - 1]:
            dot = int(dots[column])
            # A steep curve stays one line: fill the column up to where it came from.
            for row in range(dot, dot + 1) if before is None else _between(before, dot):
                self._bits[row // 4, column // 2] |= _DOTS[row % 4][column % 2]
                self._styles[row // 4, column // 2] = curve.style
            before = dot

    def rows(self) -> list[Text]:
        rows = []
        for row, styles in zip(self._bits.tolist(), self._styles.tolist(), strict=True):
            cells = zip(row, styles, strict=True)
            rows.append(Text.assemble(*((chr(_BRAILLE + bits) if bits else " ", style or "") for bits, style in cells)))
        return rows


def sparkline(values: Sequence[float], width: int) -> str:
    """The series squeezed into `width` characters, scaled to its own range; blank without values."""
    if not values or width < 1:
        return " " * max(0, width)
    chunks = np.array_split(np.asarray(values, float), min(width, len(values)))
    means = np.array([chunk.mean() for chunk in chunks])
    spread = float(np.ptp(means))
    flat = spread <= 1e-6 * float(np.abs(means).max())
    levels = np.zeros(len(means)) if flat else (means - means.min()) / spread
    return "".join(_LEVELS[int(level * 7.999)] for level in levels).rjust(width)


def bar(share: float, width: int) -> str:
    """A bar for a share of 0 to 1, in eighths of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(width)


def _between(before: int, now: int) -> range:
    if now > before:
        return range(before + 1, now + 1)
    return range(now, before) if now < before else range(now, now + 1)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits with round numbers: from 0 where nothing is negative."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    top = next((top for top in _TOPS if top >= high), float(np.ceil(high)))
    return (0.0 if low >= 0 else float(np.floor(low * 10) / 10)), top


def _labels(low: float, high: float, height: int) -> list[str]:
    """A label for the top, the middle and the bottom row, and for the quarters where there is room."""
    parts = 4 if height >= 13 else 2
    labels = [""] * height
    digits = 2 if round((high - low) / parts, 2) == round((high - low) / parts, 6) else 3
    for part in range(parts + 1):
        labels[round((height - 1) * part / parts)] = f"{high - (high - low) * part / parts:.{digits}f}"
    return labels
