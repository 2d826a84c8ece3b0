"""What a report shows beyond its results: curves, ablation, samples, and arms beside each other."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import parse
from cluster.run.reporting import report_arms
from cluster.watch.comparison import Cell, Primary, Run, compare, primary
from cluster.watch.curves import ENTROPY, REWARD, sharpening
from cluster.watch.ladder import BEYOND, apart, short
from cluster.watch.report import write_report
from cluster.watch.results import MEAN
from cluster.watch.sections import sections_of
from tests.watch.made_up import evaluation, record, result
from tests.watch.test_ablation import made_up as ablated
from tests.watch.test_comparison import run


def lines(count: int, coupling: float, trend: float) -> list[dict[str, object]]:
    """Entropy falls and reward rises by a trend; beside it, the one follows the other as told."""
    rng, found = np.random.default_rng(0), []
    shared = np.cumsum(rng.standard_normal(count)) * 0.02
    for step in range(count):
        noise = rng.standard_normal(2) * 1e-3
        entropy = 1 - trend * step / count + shared[step] + noise[0]
        reward = 0.2 + trend * step / count - coupling * shared[step] + noise[1]
        found.append(record(step + 1) | {ENTROPY: float(entropy), REWARD: float(reward)})
    return found


def test_two_trends_are_correlated_and_without_them_only_what_goes_together_is() -> None:
    together, apart = sharpening(lines(400, 1.0, 0.0)), sharpening(lines(400, 0.0, 5.0))
    assert together is not None and together.detrended_rho is not None and together.detrended_rho < -0.8
    assert apart is not None and apart.rho < -0.9
    assert apart.detrended_rho is not None and abs(apart.detrended_rho) < 0.4
    assert "without the trends" in apart.text
    few = sharpening(lines(8, 1.0, 1.0))
    assert few is not None and few.detrended_rho is None and "too few steps" in few.text
    assert sharpening([record(1), record(2)]) is None


SAMPLE = {
    "task": "composed",
    "ordinal": 7,
    "prompt": "What is <3> + 4?",
    "answer": "7",
    "experts": {"chain_sum": "3"},
    "attention": {"chain_sum": 0.25, "leg_counting": 0.75},
    "prefix": False,
    "answers": [
        {"text": "7", "count": 3, "status": "ok", "reward": 1.0, "advantage": 0.5},
        {"text": "8", "count": 1, "status": "timeout", "reward": float("nan"), "advantage": 0.0},
        *({"text": str(n), "count": 2, "status": "ok", "reward": 0.0, "advantage": -1.0} for n in range(10, 16)),
    ],
}


AWAY = {
    "whole": {"digits": 0.9, "mean": 0.9},
    "without": {
        "a<b": {"hidden": {"digits": 0.2, "mean": 0.2}, "stood_in": {"digits": 0.85, "mean": 0.85}, "used": True},
        "b": {"hidden": {"digits": 0.7, "mean": 0.7}, "stood_in": {"digits": 0.6, "mean": 0.6}, "used": False},
    },
}


def page(folder: Path) -> str:
    """A run's report with everything in it."""
    metrics = lines(60, 1.0, 0.5)
    (folder / "samples.json").write_text(json.dumps([SAMPLE]))
    (folder / "ablation.json").write_text(json.dumps(ablated().as_data()))
    (folder / "summary.json").write_text(json.dumps({"stand_ins": AWAY}))
    sections = sections_of(folder, metrics)
    write_report(
        folder / "report.html",
        name="all of it",
        evaluation=evaluation(result(0.575, 0.907)),
        figure=folder / "flow.png",
        configuration="seed: 7",
        versions={"python": "3.11.9"},
        command="musketeers train",
        more=sections,
    )
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_s_page_has_ablation_curves_and_samples(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert html.count("<img") == 4
    for figure in ("ablation.png", "entropy.png", "flow.png"):
        assert (tmp_path / figure).stat().st_size > 10_000
    assert "What is &lt;3&gt; + 4?" in html and "the gate was closed: no prefix" in html
    assert "attention: chain_sum 0.25, leg_counting 0.75" in html and "experts say chain_sum: &#x27;3&#x27;" in html
    assert "timeout" in html and "<td>6</td>" in html, "answers beyond the fifth are counted together"
    assert "Over the 80 prompts" in html and "rank correlation" in html
    assert "stand-in for a&lt;b</td><td>85.0" in html and "stand-in for b" not in html


def test_without_metrics_samples_or_ablation_nothing_is_made_up(tmp_path: Path) -> None:
    assert sections_of(tmp_path, []) == []
    (tmp_path / "samples.json").write_text("[]")
    assert [section.title for section in sections_of(tmp_path, [record(1)])] == [
        "Does attention sharpen as reward rises?",
        "Throughput and staleness",
    ]


def several(winner: float = 0.7) -> list[Run]:
    """Two arms with three seeds, and two systems that nothing trains."""
    static = [run("static", seed, 0.5) for seed in range(3)]
    frozen = [run("frozen", 0, share) for share in (0.3, 0.95)]
    named = [
        Run(each.folder, 0, {}, each.outcomes, 0, 0.0, name=name, constant=True)
        for each, name in zip(frozen, ("frozen policy alone", BEYOND[1]), strict=True)
    ]
    return [*(run("perceiver", seed, winner) for seed in range(3)), *static, *named]


def test_the_primary_comparison_is_with_the_best_rival() -> None:
    found = primary(compare(several()), BEYOND)
    assert found is not None and found.rival == "router.kind=static" and found.column == "composed"
    assert found.difference.low > 0.1 and found.text.startswith("router.kind=perceiver wins on composed: +1")
    lost = primary(compare(several(0.3)), BEYOND)
    assert lost is not None and lost.text.startswith("router.kind=static wins on composed")
    even = primary(compare(several(0.5)), BEYOND)
    assert even is not None and even.text.startswith("No difference shown")
    assert primary(compare(several()[:3])) is None


def test_the_best_of_many_has_not_won_because_it_was_picked() -> None:
    close = Cell(-0.05, -0.095, -0.005)
    assert Primary(MEAN, "a", "b", close).text.startswith("b wins on the mean")
    assert Primary(MEAN, "a", "b", close, rivals=12).text.startswith("No difference shown")
    assert Primary(MEAN, "a", "b", Cell(-0.05, -0.07, -0.03), rivals=12).text.startswith("b wins")
    won = Cell(0.05, 0.005, 0.095)
    assert Primary(MEAN, "a", "b", won, rivals=12).text.startswith("a wins"), "it beats the others as well"


def test_a_rival_that_was_lucky_once_is_not_the_best() -> None:
    runs = [run("perceiver", seed, 0.6) for seed in range(3)]
    # Seed 1 is the easy one: there the weaker rival, which has run once, does better than the other on average.
    easy = {1: 0.9}
    runs = [replace(r, outcomes=run("x", r.seed, easy.get(r.seed, 0.6)).outcomes) for r in runs]
    steady = [run("static", seed, easy.get(seed, 0.6) - 0.1) for seed in range(3)]
    found = primary(compare([*runs, *steady, run("top1", 1, 0.7)]))
    assert found is not None and found.rival == "router.kind=static"


def test_systems_that_nothing_trains_are_compared_with_every_seed() -> None:
    arms = {arm.label: arm for arm in compare(several())}
    frozen = arms["frozen policy alone"]
    assert frozen.seeds == () and frozen.by_seed["composed"] == ()
    assert frozen.difference["composed"].value == pytest.approx(-0.4, abs=0.08)


def arms_page(folder: Path) -> Path:
    """The page on several arms."""
    values = {
        "run": "several", "steps": 1, "data": {"tasks": [{"name": "t", "dataset": "chain_sum"}]},
        "experts": [{"name": "one", "model": "one"}], "policy": {"model": "p"},
    }  # fmt: skip
    return report_arms(compare(several()), folder / "out" / "report.html", "musketeers sweep", parse(values, "test"))


@given(st.lists(st.floats(0, 100), max_size=20))
def test_labels_stand_apart_in_their_order_and_move_only_where_they_must(places: list[float]) -> None:
    found = apart(places, 4.0)
    order = sorted(range(len(places)), key=places.__getitem__)
    assert all(found[b] - found[a] >= 4.0 - 1e-9 for a, b in itertools.pairwise(order))
    assert math.isclose(sum(found), sum(places), abs_tol=1e-9), "labels that touch are moved as far up as down"
    ends = [-math.inf, *(found[i] for i in order), math.inf]
    for below, index, above in zip(ends, order, ends[2:], strict=False):
        if places[index] - below > 4.0 and above - places[index] > 4.0:
            assert found[index] == places[index]


def test_several_arms_have_a_page_with_ladder_and_costs(tmp_path: Path) -> None:
    html = arms_page(tmp_path).read_text(encoding="utf-8")
    assert "router.kind=perceiver wins on composed" in html and f"Not among its rivals: {BEYOND[1]}" in html.replace(
        "&#x27;", "'"
    )
    assert (tmp_path / "out" / "ladder.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "cost.png").stat().st_size > 5_000


def test_labels_in_pictures_are_short() -> None:
    assert short("router.kind=perceiver, learner.learning_rate=1e-4") == "kind=perceiver, learning_rate=1e-4"
    assert short("x" * 60) == "x" * 35 + "…"


@pytest.mark.slow
def test_both_pages_open_in_a_browser_with_content_and_without_errors(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    assert program, "chromium is not installed: scripts/system-packages.sh --slow-tests"
    (tmp_path / "one").mkdir()
    page(tmp_path / "one")
    pages = [tmp_path / "one" / "report.html", arms_page(tmp_path)]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for path, pictures in zip(pages, (4, 2), strict=True):
            said: list[str] = []
            asked: list[str] = []
            shown = browser.new_page()
            shown.on("console", lambda message, said=said: said.append(message.text))
            shown.on("pageerror", lambda error, said=said: said.append(str(error)))
            shown.on("request", lambda request, asked=asked: asked.append(request.url))
            shown.goto(path.as_uri())
            sizes = shown.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
            assert len(sizes) == pictures and all(done and wide > 500 and high > 100 for done, wide, high in sizes)
            assert said == [] and all(url.startswith(("file:", "data:")) for url in asked)
            # A picture of one colour shows nothing.
            colours = shown.evaluate(
                """[...document.images].map(i => { const c = document.createElement('canvas'); c.width = c.height = 64;
                const g = c.getContext('2d'); g.drawImage(i, 0, 0, 64, 64);
                return new Set(new Uint32Array(g.getImageData(0, 0, 64, 64).data.buffer)).size; })"""
            )
            assert min(colours) > 20
        browser.close()
