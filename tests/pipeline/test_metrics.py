"""A step's metrics, from what its waves report."""

from __future__ import annotations

import pickle

from cluster.run.metrics import cut_metrics
from cluster.run.scoring import GroupReport, WaveReport, wave_report
from rollout.types import RewardStatus, Rollout


def wave(prompts: int, *cut: int) -> WaveReport:
    """Of so many prompts, of which each expert did not see as many to their middle."""
    group = GroupReport(0, "t", 0, (1.0,), (RewardStatus.OK,), 0, 0.0, (), 0.0, 0, (1.0,))
    return WaveReport((group,) * prompts, 0, 0, 0, 0.0, 0.0, 0.0, cut=cut)


def test_shares_of_cut_prompts_are_over_all_waves_that_asked_the_experts() -> None:
    found = cut_metrics([wave(4, 1, 0), wave(12, 3, 12), wave(5)], ["one", "two"])
    assert found == {"experts/one/truncated": 4 / 16, "experts/two/truncated": 12 / 16}
    assert cut_metrics([wave(5)], ["one", "two"]) == {}


def test_how_many_were_cut_goes_from_the_rollout_to_the_driver() -> None:
    rollout = Rollout((), 0, 0, 0, 0.0, 0.0, cut=(2, 3))
    for each in (rollout, pickle.loads(pickle.dumps(rollout)), rollout.with_groups(()), rollout.scored([])):
        assert each.cut == (2, 3) and wave_report(each, [], 0.0).cut == (2, 3)
