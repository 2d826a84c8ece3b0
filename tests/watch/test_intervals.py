from __future__ import annotations

import pytest

from cluster.watch.intervals import Accuracy, newcombe, paired_bootstrap, wilson, wilson_mean


@pytest.mark.parametrize(
    ("right", "prompts", "low", "high"),
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_published_values(right: int, prompts: int, low: float, high: float) -> None:
    assert wilson(Accuracy(right / prompts, prompts)) == pytest.approx((low, high), abs=5e-5)


def test_wilson_needs_prompts_and_a_share() -> None:
    with pytest.raises(ValueError, match="needs prompts"):
        wilson(Accuracy(0.5, 0))
    with pytest.raises(ValueError, match="share from 0 to 1"):
        wilson(Accuracy(57.5, 400))


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    # Newcombe 1998, "Interval estimation for the difference between independent proportions", table II, method 10.
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((5, 56), (0, 29), -0.0381, 0.1926),
    ],
)
def test_newcombe_against_published_values(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    one, other = (Accuracy(right / prompts, prompts) for right, prompts in (first, second))
    assert newcombe([one], [other]) == pytest.approx((low, high), abs=5e-5)


def test_a_mean_over_equal_tasks_is_narrower_by_the_root_of_their_number() -> None:
    single = wilson(Accuracy(0.5, 100))
    low, high = wilson_mean([Accuracy(0.5, 100)] * 4)
    assert wilson_mean([Accuracy(0.5, 100)]) == pytest.approx(single)
    assert (low, high) == pytest.approx((0.5 - (0.5 - single.low) / 2, 0.5 + (single.high - 0.5) / 2))
    assert newcombe([Accuracy(0.9, 50)] * 4, [Accuracy(0.9, 50)] * 4).high == pytest.approx(
        newcombe([Accuracy(0.9, 50)], [Accuracy(0.9, 50)]).high / 2
    )


def test_paired_bootstrap_agrees_with_the_normal_interval() -> None:
    first = [1] * 300 + [0] * 700
    second = [1] * 200 + [0] * 740 + [1] * 60
    # 100 prompts only the first answers, 60 only the second: variance of the difference 0.16 - 0.04 ** 2.
    reach = 1.96 * ((0.16 - 0.04**2) / 1000) ** 0.5
    bounds = paired_bootstrap([first], [second])
    assert bounds == pytest.approx((0.04 - reach, 0.04 + reach), abs=0.002)
    assert bounds == paired_bootstrap([first], [second]), "the seed is fixed"


def test_pairing_narrows_the_interval_where_systems_agree() -> None:
    first, second = [1] * 55 + [0] * 45, [1] * 50 + [0] * 50
    paired = paired_bootstrap([first], [second])
    unpaired = newcombe([Accuracy(0.55, 100)], [Accuracy(0.5, 100)])
    assert paired.low > 0 > unpaired.low


def test_every_task_weighs_alike_in_the_bootstrap() -> None:
    # +1 on all 10 prompts of one task, 0 on all 1,000 of the other: the mean over tasks is one half.
    bounds = paired_bootstrap([[1] * 10, [0] * 1000], [[0] * 10, [0] * 1000])
    assert bounds.high == pytest.approx(0.5 + wilson(Accuracy(0.0, 1000)).high / 2)
    assert bounds.low == pytest.approx(0.5 - wilson(Accuracy(0.0, 10)).high, abs=0.001)


def test_paired_outcomes_need_the_same_prompts() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        paired_bootstrap([[1, 0]], [[1]])


def test_systems_that_agree_everywhere_may_still_differ_elsewhere() -> None:
    low, high = paired_bootstrap([[1, 0] * 50], [[1, 0] * 50])
    assert (low, high) == (pytest.approx(-0.0370, abs=1e-4), pytest.approx(0.0370, abs=1e-4))
