from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from rich.console import Console

from cluster.watch.chart import Chart, Curve, bar, sparkline
from cluster.watch.live import LiveWatch, PlainWatch, Plan, make_watch
from cluster.watch.panels import duration, number
from cluster.watch.series import History
from tests.watch.made_up import EXPERTS, TASKS, record

PLAN = Plan(name="tiny", total_steps=600, tasks=TASKS, experts=EXPERTS)


class Clock:
    """Time that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drawn(
    records: Sequence[Mapping[str, object]], width: int = 100, height: int = 30, plan: Plan = PLAN
) -> tuple[list[str], str]:
    """The live display after some steps, half a second each: as lines and as one string of single-spaced words."""
    clock = Clock()
    console = Console(record=True, width=width, height=height, force_terminal=True, file=io.StringIO())
    watch = LiveWatch(console, clock=clock)
    watch.start(plan)
    for metrics in records:
        clock.now += 0.5
        watch.step(metrics)
    watch.stop()
    console.export_text()
    console.print(watch)
    lines = console.export_text().splitlines()
    return lines, " ".join(" ".join(lines).split())


@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24)])
def test_the_display_holds_every_number_at_its_size(width: int, height: int) -> None:
    lines, text = drawn([record(step) for step in range(1, 151)], width, height)
    assert len(lines) == height
    assert not lines[-1].strip(), "room for a note"
    assert max(map(len, lines)) == width
    for expected in (
        "n-Musketeers tiny",
        "router v150 staleness 0.4 (max 1)",
        "step 150/600 25%",
        "3:45 left",
        "mean 0.625 ± 0.312",
        "composed 0.375",
        "chain_sum 0.875",
        "encode 10 ms",
        "idle 95%",
        "rollout 90 ms",
        "45% idle 55%",
        "other 48 ms",
        "3,416 tokens/s cache hits 98%",
        "a step: 200 ms",
    ):
        assert expected in text, expected
    for name, value in {
        "KL to policy": "0.913",
        "entropy": "1.23",
        "no signal": "17%",
        "clipped": "6%",
        "truncated": "2%",
        "masked rewards": "3%",
        "log-prob gap": "1.2e-06",
        "gradient norm": "44.4",
        "prefix / token": "0.021",
        "attn. entropy": "0.518",
    }.items():
        assert any(f" {name} " in line and f" {value} " in line.partition(name)[2] for line in lines), name
    attention = [line for line in lines if "0.47" in line or "0.81" in line]
    assert ["composed" in line and "0.53" in line for line in attention] == [True, False]
    assert "chain_sum" in attention[1] and "0.19" in attention[1]


def test_missing_metrics_are_dashes() -> None:
    lines, text = drawn([{"step": 1}])
    assert "router – staleness – (max –)" in text
    assert "mean – ± –" in text
    assert "– tokens/s cache hits –" in text
    assert sum(line.count("–") for line in lines) > 25
    assert "0.000" not in text and "nan" not in text and "step 0" not in text


def test_a_value_that_is_not_finite_is_a_dash() -> None:
    _, text = drawn([record(1, router__version=float("nan"))])
    assert "router – staleness 0.4" in text


def test_a_task_that_a_step_lacks_keeps_its_last_value() -> None:
    _, text = drawn([record(1), {"step": 2}])
    assert "composed 0.375" in text
    assert "0.47" in text, "its attention, too"


def test_a_resumed_run_shows_the_steps_before() -> None:
    plan = Plan(name="tiny", total_steps=600, tasks=TASKS, experts=EXPERTS, history=[record(s) for s in range(1, 201)])
    lines, text = drawn([record(step) for step in range(201, 203)], plan=plan)
    assert "step 202/600" in text
    assert "3:19 left" in text, "the pace is that of this process: 398 steps of half a second"
    assert any("1 " in line and "step 202 " in line for line in lines), "the axis begins at the first step"


def test_many_tasks_and_experts_do_not_break_the_frame() -> None:
    tasks, experts = tuple(f"task_with_a_long_name_{i}" for i in range(12)), tuple(f"expert{i}" for i in range(12))
    metrics = {f"attention/{task}/{expert}": 0.25 for task in tasks for expert in experts}
    plan = Plan(name="a" * 90, total_steps=9, tasks=tasks, experts=experts)
    lines, text = drawn([{"step": 1, **metrics}], 80, 24, plan)
    assert len(lines) == 24
    assert {len(line.rstrip()) for line in lines[2:-1]} == {80}
    assert "name_2 – …" in text and "name_3 –" not in text
    assert "+6 tasks" in text and "+9 experts" in text


def test_a_note_stays_readable() -> None:
    console = Console(width=100, height=30, force_terminal=True, file=io.StringIO())
    watch = LiveWatch(console)
    watch.start(PLAN)
    watch.note("checkpoint [step-000100] written")
    watch.stop()
    watch.stop()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("checkpoint [step-000100] written") >= 2, "above the display and in it"


def test_the_terminal_decides_which_watch() -> None:
    def chosen(**console: object) -> type:
        return type(make_watch(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), **console)))  # type: ignore[arg-type]

    assert chosen(force_terminal=True, width=80, height=24) is LiveWatch
    assert chosen(force_terminal=False, width=80, height=24) is PlainWatch
    assert chosen(force_terminal=True, width=60, height=24) is PlainWatch
    assert chosen(force_terminal=True, width=80, height=15) is PlainWatch


def plain(**settings: float) -> tuple[PlainWatch, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=60)
    return PlainWatch(console, clock=clock, **settings), clock, out  # type: ignore[arg-type]


def test_plain_lines_every_few_steps() -> None:
    watch, clock, out = plain(every_steps=10)
    watch.start(Plan(name="tiny", total_steps=25, tasks=TASKS, experts=EXPERTS))
    for step in range(1, 26):
        clock.now += 0.5
        watch.step(record(step))
    watch.stop()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("tiny: 25 steps; tasks: composed, chain_sum; experts: chain_sum, leg_counting")
    assert [line.split()[1] for line in lines[1:]] == ["1/25", "11/25", "21/25", "25/25"]
    assert lines[2] == (
        "step 11/25  reward 0.625 (composed 0.375 chain_sum 0.875)  kl 0.913  no signal 17%"
        "  staleness 0.400  200 ms/step  0:07 left"
    )


def test_plain_lines_every_few_seconds_and_a_last_one() -> None:
    watch, clock, out = plain(every_steps=1000, every_seconds=30)
    watch.start(PLAN)
    for step in range(1, 6):
        clock.now += 12
        watch.step({"step": step})
    watch.note("interrupted")
    watch.stop()
    watch.stop()
    lines = out.getvalue().splitlines()[1:]
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["1/600", "4/600", "5/600"]
    assert lines[2] == "interrupted"
    assert "reward – (composed – chain_sum –)  kl –" in lines[0]


def test_smoothing_follows_and_starts_at_the_first_value() -> None:
    history = History([{"step": step, "reward/mean": 0.0 if step < 50 else 1.0} for step in range(100)])
    smoothed = history.series("reward/mean").smoothed
    assert smoothed[0] == smoothed[49 - 1] == 0.0
    assert 0.05 < smoothed[50] < 0.2
    assert 0.95 < smoothed[-1] < 1.0
    assert History([{"step": 1, "reward/mean": 0.7}]).smoothed("reward/mean") == pytest.approx(0.7)


def test_a_rising_curve_rises_in_the_chart() -> None:
    rows = [row.plain for row in Chart([Curve([1, 2, 3], [0.0, 0.5, 1.0], "cyan")]).rows(30, 6)]
    assert [len(row) for row in rows] == [30] * 6
    assert rows[0].startswith("1.00 ┤") and rows[4].startswith("0.00 ┤") and rows[5].split() == ["1", "step", "3"]
    marks = [[i for i, cell in enumerate(row) if 0x2800 < ord(cell) < 0x2900] for row in rows[:5]]
    assert marks[4][0] == 6 and marks[0][-1] == 29
    assert all(above[0] > below[0] for above, below in pairwise(marks))


def test_sparkline_and_bar() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.1 + 0.2, 0.3, 0.3], 5) == "  ▁▁▁", "rounding is no trend"
    assert sparkline([], 3) == "   "
    assert [bar(share, 4) for share in (0.0, 0.5, 0.53125, 1.0, 7.0)] == ["    ", "██  ", "██▏ ", "████", "████"]


def test_numbers_are_short() -> None:
    assert [number(value) for value in (None, 0.0, 0.00012, 0.0123, 1.5, 44.4, 12345.0, -0.5)] == (
        ["–", "0.000", "1.2e-04", "0.012", "1.50", "44.4", "1.2e+04", "-0.500"]
    )
    assert [duration(value) for value in (None, 59.6, 3725.0)] == ["–", "1:00", "1:02:05"]
