"""Runs beside each other: arms, pairing, intervals over seeds and prompts."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.watch.comparison import (
    Comparison,
    ComparisonError,
    Run,
    compare,
    crossed,
    in_points,
    labels,
    markdown,
    without_pools,
    write,
)
from cluster.watch.results import MEAN


def run(kind: str, seed: int, share: float = 0.5, prompts: int = 200, **settings: object) -> Run:
    """A run whose answers are right with some chance; equal seeds have equal luck."""
    luck = np.random.default_rng(seed)
    outcomes = {task: [int(u < share) for u in luck.random(prompts)] for task in ("chain_sum", "composed")}
    return Run(Path(f"runs/{kind}-{seed}"), seed, {"router.kind": kind, "steps": 10, **settings}, outcomes, 100, 5.0)


def test_runs_that_differ_in_their_seed_are_one_arm_and_labels_say_what_else_differs() -> None:
    arms = compare([run("perceiver", 0), run("static", 0), run("perceiver", 1), run("static", 1)])
    assert [(arm.label, arm.seeds) for arm in arms] == [
        ("router.kind=perceiver", (0, 1)),
        ("router.kind=static", (0, 1)),
    ]
    assert list(arms[0].accuracy) == ["composed", "chain_sum", MEAN]
    assert labels([run("static", 0), run("static", 1)]) == ["all the same"] * 2


def test_runs_whose_training_prompts_differ_though_their_settings_do_not_are_refused() -> None:
    def of(kind: str, digest: str, **settings: object) -> Run:
        return replace(run(kind, 0, **{"data.seed": 1, "policy.model": "p"} | settings), pools={"sums": digest})

    said = (
        r"perceiver-0 and runs/static-0 have equal data sections and other prompts of task 'sums' .*train one of them"
    )
    with pytest.raises(ComparisonError, match=said):
        compare([of("perceiver", "a"), of("static", "b")])
    for other in (of("static", "a"), of("static", "b", **{"data.seed": 2}), of("static", "b", **{"policy.model": "q"})):
        assert len(compare([of("perceiver", "a"), other])) == 2
    before = replace(of("static", "a"), pools={})
    compare([of("perceiver", "a"), before])
    assert "runs/static-0: of a version that kept no data.json" in without_pools([of("perceiver", "a"), before])
    assert not without_pools([of("perceiver", "a")])


def test_differences_are_paired_by_seed_and_prompt() -> None:
    """Equal luck leaves no spread but that of the prompts that only one arm gets right."""
    seeds = range(4)
    arms = compare([*(run("static", s, 0.5) for s in seeds), *(run("perceiver", s, 0.6) for s in seeds)])
    (difference,) = [arm.difference["composed"] for arm in arms[1:]]
    assert difference.value == pytest.approx(0.1, abs=0.03) and difference.low > 0.04
    alone = arms[1].accuracy["composed"]
    assert difference.high - difference.low < alone.high - alone.low
    assert not arms[0].difference


def test_every_shared_seed_counts() -> None:
    runs = [*(run("static", s, 0.5) for s in range(4)), *(run("perceiver", s, 0.5 if s else 0.9) for s in range(4))]
    assert compare(runs)[1].difference["composed"].value == pytest.approx(0.1, abs=0.03)


def test_only_seeds_that_both_arms_have_are_compared() -> None:
    arms = compare([run("static", 0, 0.5), run("static", 1, 0.5), run("perceiver", 1, 0.5), run("perceiver", 2, 0.9)])
    assert arms[1].seeds == (1, 2) and arms[1].difference["composed"].value == 0.0
    with pytest.raises(ComparisonError, match="shares no seed"):
        compare([run("static", 0), run("perceiver", 1)])


def test_an_arm_with_a_run_of_unknown_cost_has_no_cost() -> None:
    runs = [replace(run(kind, seed), operations=4e15) for kind in ("static", "perceiver") for seed in (0, 1)]
    arms = compare([*runs[:3], replace(runs[3], operations=0.0)])
    assert [arm.operations for arm in arms] == [4e15, 0.0]
    assert [line.split(" | ")[3] for line in markdown(arms).splitlines()[2:]] == ["4 (0)", "–"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ComparisonError, match="different held-out prompts"):
        compare([run("static", 0), run("perceiver", 0, prompts=100)])
    with pytest.raises(ComparisonError, match="same arm and seed 0"):
        compare([run("static", 0), run("static", 0)])


@pytest.mark.parametrize("seeds", [3, 8])
def test_intervals_cover_the_truth_when_seeds_and_prompts_both_vary(seeds: int) -> None:
    """A bootstrap over prompts alone would be far too sure: 95 % must hold for another seed and other prompts."""
    rng = np.random.default_rng(0)
    covered = narrow = 0
    for trial in range(60):
        lucky, hard = rng.normal(0, 0.8, size=seeds), rng.normal(0, 1, size=150)
        chance = 1 / (1 + np.exp(-(lucky[:, None] + hard[None])))
        answers = [{"t": (rng.random(150) < row).astype(int).tolist()} for row in chance]
        # The truth over all seeds and prompts of this kind is one half, by symmetry.
        cell = crossed(answers, "t", seed=trial)
        covered += cell.low <= 0.5 <= cell.high
        pooled = np.mean([a["t"] for a in answers])
        narrow += abs(pooled - 0.5) <= 1.96 * (0.25 / (seeds * 150)) ** 0.5
    assert covered >= 54, covered
    assert narrow < covered - 10, "the trap that this guards against is not one"


def test_one_seed_leaves_the_prompts() -> None:
    cell = crossed([{"t": [1, 0] * 100}], "t")
    assert (
        cell.value == 0.5 and cell.low == pytest.approx(0.43, abs=0.02) and cell.high == pytest.approx(0.57, abs=0.02)
    )


def test_equal_outcomes_are_no_certainty() -> None:
    none = crossed([{"t": [0] * 200}] * 10, "t")
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(0.0188, abs=1e-4)
    all_right = crossed([{"t": [1] * 200}], "t")
    assert (all_right.value, all_right.high) == (1.0, 1.0) and all_right.low == pytest.approx(0.9812, abs=1e-4)
    same = crossed([{"t": [0] * 200}] * 10, "t", lowest=-1.0)
    assert (same.low, same.high) == (pytest.approx(-0.0188, abs=1e-4), pytest.approx(0.0188, abs=1e-4))
    # One answer more is no more certain than none.
    one = crossed([{"t": [0] * 200}] * 9 + [{"t": [1] + [0] * 199}], "t")
    assert one.low == 0.0 and one.high >= none.high
    # At +1 a prompt that was not asked may be -1: twice the way.
    apart = crossed([{"t": [1] * 200}], "t", lowest=-1.0)
    assert (apart.low, apart.high) == (pytest.approx(1 - 2 * 0.0188, abs=1e-4), 1.0)
    # An ordinary accuracy has the bootstrap's interval.
    half = crossed([{"t": [0, 1] * 100}], "t")
    assert half.high - half.value == pytest.approx(1.96 * math.sqrt(0.25 / 200), abs=0.006)


def test_one_name_for_two_models_is_refused() -> None:
    def built(kind: str, seed: int, policy: str) -> Run:
        return replace(run(kind, seed), frozen={"zoo/composed/policy in float32": policy})

    assert compare([built("static", 0, "a"), built("perceiver", 0, "a"), run("top1", 0)])
    with pytest.raises(
        ComparisonError, match="runs/static-0 and runs/perceiver-0 had different weights of zoo/composed"
    ):
        compare([built("static", 0, "a"), built("perceiver", 0, "b")])


def test_files(tmp_path: Path) -> None:
    arms = compare([run("static", 0), run("perceiver", 0, 0.7)])
    written = {path.name: path.read_text() for path in write(arms, tmp_path)}
    assert (
        json.loads(written["results.json"])[1]["difference"]["composed"]["value"]
        == arms[1].difference["composed"].value
    )
    rows = list(csv.DictReader(written["results.csv"].splitlines()))
    assert len(rows) == 6 and rows[0]["difference"] == "" and float(rows[3]["difference"]) > 0
    assert markdown(arms).count("\n") == 4 and "router.kind=perceiver" in written["results.md"]


@pytest.mark.parametrize(("width", "tables"), [(80, 4), (200, 1)])
def test_a_terminal_of_any_width_shows_every_number_whole(width: int, tables: int) -> None:
    arms = compare([run("static", 0), run("perceiver", 0, 0.7)])
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Comparison(arms))
    said = console.export_text()
    assert said.count("┏") == tables
    assert all(f" {cell.text} " in said for arm in arms for cell in arm.accuracy.values())
    assert all(f" {in_points(cell)} " in said for cell in arms[1].difference.values())
    assert said.count("router.kind=perceiver") == tables


def test_as_many_other_prompts_are_refused_too() -> None:
    ours, theirs = (replace(run("perceiver", seed), prompts=digest) for seed, digest in ((0, "a"), (1, "b")))
    with pytest.raises(ComparisonError, match="different held-out prompts"):
        compare([ours, theirs])
    assert compare([ours, replace(theirs, prompts="")])
