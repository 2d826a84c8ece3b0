"""What an ablation says, from made-up answers; and pass@k."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr

from cluster.watch import ablation
from cluster.watch.ablation import FROZEN, KNOCKED_OUT, Ablated, Ablation, foretold
from cluster.watch.ablation_figure import ablation_figure
from cluster.watch.passes import pass_at, pass_rates


def made_up(count: int = 40) -> Ablation:
    """Expert `a` carries task x wholly, `b` carries task y by half; attention says so for a alone."""
    tasks = ("x",) * count + ("y",) * count
    right = [1] * (2 * count)
    without_a = [0] * count + [1] * count
    without_b = [1] * count + [place % 2 for place in range(count)]
    of_y = [[0.5 - 0.4 * (place % 2), 0.5 + 0.4 * (place % 2)] for place in range(count)]
    looks = np.array([[0.9, 0.1]] * count + of_y)
    found = (
        Ablated(KNOCKED_OUT, "a", without_a),
        Ablated(KNOCKED_OUT, "b", without_b),
        Ablated(FROZEN, None, [0] * (2 * count)),
    )
    return Ablation(("a", "b"), tasks, right, looks, found)


def test_losses_are_told_by_task_with_intervals_and_attention() -> None:
    losses = {(loss.what, loss.expert, loss.task): loss for loss in made_up().losses()}
    assert losses[KNOCKED_OUT, "a", "x"].loss == 1.0 and losses[KNOCKED_OUT, "a", "y"].loss == 0.0
    half = losses[KNOCKED_OUT, "b", "y"]
    assert half.loss == 0.5 and 0.3 < half.low < 0.5 < half.high < 0.7
    assert half.attention == pytest.approx(0.7) and losses[KNOCKED_OUT, "a", "x"].attention == pytest.approx(0.9)
    assert losses[FROZEN, None, "y"].loss == 1.0 and losses[FROZEN, None, "y"].attention is None


def test_attention_foretells_a_loss_or_does_not() -> None:
    found = made_up().over_prompts()
    assert found["a"].rho is None, "a is needed by one task alone, and looked at there: no prompt differs from another"
    assert found["b"].rho == pytest.approx(-1) and found["b"].p == pytest.approx(1 / 2001)
    assert made_up().over_cells().count == 4 and made_up().over_cells().p is None
    assert foretold([0] * 3, [0.5, 0.5, 0.5], [0, 1, 0]).rho is None


def test_within_one_task_it_is_spearmans_correlation() -> None:
    rng = np.random.default_rng(0)
    attention, losses = rng.random(50).round(1), rng.integers(0, 2, 50)
    found, known = foretold(["x"] * 50, attention, losses), spearmanr(attention, losses)
    assert found.rho == pytest.approx(known.statistic) and found.p == pytest.approx(known.pvalue, abs=0.03)


def test_what_tasks_differ_in_is_no_correlation_within_them() -> None:
    rng = np.random.default_rng(1)
    tasks, chance = ["x"] * 100 + ["y"] * 100, np.repeat([0.2, 0.8], 100)
    attention, losses = chance + 0.1 * rng.random(200), (rng.random(200) < chance).astype(float)
    found = foretold(tasks, attention, losses)
    assert spearmanr(attention, losses).pvalue < 1e-6, "the trap that this guards against is not one"
    assert found.p is not None and found.p > 0.05


def test_prompts_that_the_router_got_wrong_say_nothing_of_what_it_needs() -> None:
    looks = np.array([[0.9], [0.2], [0.1], [1.0]])
    found = Ablation(("a",), ("x",) * 4, [1, 1, 1, 0], looks, (Ablated(KNOCKED_OUT, "a", [0, 1, 1, 1]),))
    assert found.over_prompts()["a"].count == 3 and found.over_prompts()["a"].rho == pytest.approx(0.866, abs=1e-3)


def test_it_is_shown_as_a_table_and_a_picture(tmp_path: Path) -> None:
    data = made_up().as_data()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(ablation.table(data))
    shown = console.export_text()
    assert "a knocked out" in shown and "+50.0 [" in shown and "(0.90)" in shown and "prefix frozen" in shown
    assert any("attention on b" in line for line in ablation.said(data))
    ablation_figure(data, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(("right", "samples", "k"), [(0, 5, 3), (1, 5, 3), (2, 6, 2), (5, 5, 5), (3, 6, 4)])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(right: int, samples: int, k: int) -> None:
    answers = [1] * right + [0] * (samples - right)
    draws = list(itertools.combinations(answers, k))
    assert pass_at(k, right, samples) == pytest.approx(np.mean([any(draw) for draw in draws]))


def test_rates_grow_with_k_and_weigh_tasks_alike() -> None:
    rates = pass_rates({"x": [0, 4, 1], "y": [4]}, 4)
    assert list(rates) == ["1", "2", "4"]
    assert rates["1"]["x"]["value"] == pytest.approx(5 / 12) and rates["4"]["x"]["value"] == pytest.approx(2 / 3)
    assert rates["1"]["mean"]["value"] == pytest.approx((5 / 12 + 1) / 2)
    assert rates["1"]["x"]["low"] < rates["1"]["x"]["value"] < rates["1"]["x"]["high"]
    with pytest.raises(ValueError, match="pass@5"):
        pass_at(5, 1, 4)
