"""The admission state machine under random durations, crashes, poison and resumes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.run.admission import Admission, AdmissionError, Limits
from tests.pipeline.simulation import Weather, simulate

SHAPES = {"groups": st.integers(1, 6), "staleness": st.integers(0, 3), "updates": st.integers(1, 12)}
WEATHER = st.builds(
    Weather,
    wave=st.integers(1, 4),
    spread=st.floats(0.0, 2.0),
    crash=st.floats(0.0, 0.4),
    poison=st.frozensets(st.integers(0, 40), max_size=2),
    signal=st.floats(0.4, 1.0),
    save=st.floats(0.0, 1.0),
    resume=st.floats(0.0, 0.05),
)
LIMITS = st.builds(
    Limits, groups=st.none() | st.integers(1, 20), bytes=st.none() | st.integers(1, 100), attempts=st.just(50)
)


@settings(max_examples=300, deadline=None)
@given(**SHAPES, weather=WEATHER, limits=LIMITS, seed=st.integers(0, 2**20))
def test_bound_holds_every_prompt_ends_once_and_the_run_ends(
    groups: int, staleness: int, updates: int, weather: Weather, limits: Limits, seed: int
) -> None:
    limits = Limits(limits.groups, limits.bytes, attempts=2 if weather.poison else limits.attempts)
    done = simulate(groups, staleness, updates, weather, seed, limits)
    a = done.admission
    assert a.version == updates and not a.running and not a.retry and not a.finished
    ends = Counter([*a.trained, *a.filtered, *a.dead])
    assert ends == Counter(range(a.next_ordinal)), "a prompt ended twice, or never"
    assert all(0 <= at - produced <= staleness for at, produced in done.trained.values())
    per_update = Counter(at for at, _ in done.trained.values())
    assert per_update == dict.fromkeys(range(updates), groups)


@settings(max_examples=60, deadline=None)
@given(**SHAPES, weather=WEATHER, seed=st.integers(0, 2**20))
def test_what_is_trained_is_what_was_issued_not_what_was_quick(
    groups: int, staleness: int, updates: int, weather: Weather, seed: int
) -> None:
    kind = Weather(weather.wave, weather.spread, weather.crash, save=weather.save, resume=weather.resume)
    done = simulate(groups, staleness, updates, kind, seed, Limits(attempts=10_000))
    # No prompt is replaced: the trained ones are the stream's first ones, so their mean reward is the stream's own.
    assert set(done.trained) == set(range(groups * updates))


def test_a_pipeline_that_takes_the_quick_ones_would_be_biased() -> None:
    done = simulate(8, 2, 40, Weather(spread=1.5), seed=3)
    rewards = np.array([done.reward(ordinal) for ordinal in range(8 * 40)])
    trained = np.array([done.reward(ordinal) for ordinal in done.trained])
    quick = np.sort(rewards)[: len(rewards) // 2]
    assert trained.mean() == pytest.approx(rewards.mean())
    assert quick.mean() < 0.6 * rewards.mean(), "the simulation could not have shown a bias"


def test_a_bound_above_zero_overlaps() -> None:
    ahead = simulate(4, 2, 20, Weather(spread=1.5), seed=1)
    staleness = [at - produced for at, produced in ahead.trained.values()]
    assert max(staleness) == 2 and min(staleness) < 2


def test_poison_is_found_alone_and_spares_its_company() -> None:
    done = simulate(4, 1, 10, Weather(wave=4, poison=frozenset({5})), seed=0)
    assert done.admission.dead == {5}
    assert len(done.admission.trained) == 40


def test_a_blameless_failure_counts_against_nobody() -> None:
    a = Admission(2, 0, 5)
    for _ in range(20):
        assert a.fail(a.issue(2), blameless=True) == []
    assert a.issue(2) == [0, 1]


def test_a_prompt_that_failed_twice_in_company_runs_with_nothing_else_under_way() -> None:
    a = Admission(3, 1, 5)
    for _ in range(2):
        a.fail(a.issue(3))
    assert a.issue(3) == [0] and a.issue(3) == []
    a.finish([0])
    for _ in range(2):
        assert a.issue(3) == [1] and a.fail([1]) == []
    assert a.issue(3) == [1] and a.fail([1]) == [1]
    assert a.dead == {1} and a.issue(3) == [2]
    a.finish([2])
    assert a.issue(3) == [3, 4, 5] and a.issue(1) == [6]
    assert a.fail([6]) == [] and a.failures[6] == (1, 0), "others were under way: it may have been their fault"


def test_a_lost_group_runs_again_under_the_present_version() -> None:
    a = Admission(1, 1, 5)
    a.finish(a.issue(2))
    a.train([0])
    a.drop([1])
    assert a.issue(2) == [1, 2]
    assert a.running == {1: 1, 2: 1}


def test_the_update_waits_for_what_it_would_leave_too_old() -> None:
    a = Admission(1, 0, 5, Limits())
    a.issue(1)
    assert a.batch() is None and a.waits_for == [0]
    late = Admission(2, 1, 5)
    first = late.issue(4)
    late.finish(first[1:3])
    assert late.batch() == [1, 2]
    late.train([1, 2])
    late.finish(late.issue(2))
    assert late.batch() is None and late.waits_for == [0, 3]


def test_groups_that_would_all_be_due_at_once_are_trained_in_time() -> None:
    a = Admission(1, 2, 9)
    a.issue(3)
    a.finish([0])
    a.train([0])
    a.finish(a.issue(1))
    # Prompts 1 and 2 of version 0 have updates 1 and 2 left: one for prompt 3 would leave them a single one.
    assert a.batch() is None and a.waits_for == [1, 2]
    a.finish([2])
    assert a.batch() == [2]


@pytest.mark.parametrize(
    ("event", "message"),
    [("finish", "finished but was not running"), ("train", "trained but had not finished"),
     ("fail", "failed but was not running"), ("filter", "filtered but had not finished")],
)  # fmt: skip
def test_events_out_of_order_are_refused(event: str, message: str) -> None:
    with pytest.raises(AdmissionError, match=f"prompt 7 was {message}|prompt 7 {message}"):
        getattr(Admission(1, 0, 1), event)([7])


def test_training_beyond_the_bound_is_refused() -> None:
    a = Admission(1, 0, 5)
    a.finish(a.issue(1))
    a.version = 1
    with pytest.raises(AdmissionError, match="more than max_staleness 0 later"):
        a.train([0])
