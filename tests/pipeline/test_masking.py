"""Verifiers that give no verdict: a note, then the end of the run with their name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.run.masking import ENOUGH, LOOK_BACK, VerifierHealth
from cluster.run.recovery import RunError
from cluster.run.scoring import GroupReport, WaveReport
from rewards.config import RewardsConfig
from rollout.types import Prompt, RewardStatus
from tests.pipeline.fake_fleet import Stage, World, config


def groups(task: str, count: int, masked: int, of: int = 8) -> list[GroupReport]:
    """So many groups with some completions masked in each."""
    statuses = (RewardStatus.TIMEOUT,) * masked + (RewardStatus.OK,) * (of - masked)
    reason = "no verdict within 10 s" if masked else ""
    return [GroupReport(n, task, 0, (0.0,) * of, statuses, 0, 1.0, (), 0.0, 0, (), reason) for n in range(count)]


def test_a_share_above_the_limit_ends_the_run_naming_task_share_and_reason() -> None:
    notes: list[str] = []
    watch = VerifierHealth(RewardsConfig(masked_limit=0.2), notes.append)
    watch.observe(groups("fine", 100, 0))
    watch.observe(groups("mute", ENOUGH - 1, 2))
    assert not notes
    with pytest.raises(RunError, match=r"verifier of task 'mute' gave no verdict on 25\.0%.*\(20%\).*within 10 s"):
        watch.observe(groups("mute", 1, 2))


def test_a_share_above_one_percent_is_said_once_and_only_the_last_groups_count() -> None:
    notes: list[str] = []
    watch = VerifierHealth(RewardsConfig(masked_limit=0.2), notes.append)
    watch.observe(groups("some", ENOUGH, 1))
    watch.observe(groups("some", 1, 1))
    assert len(notes) == 1
    assert "'some' gave no verdict on 12.5%" in notes[0]
    watch = VerifierHealth(RewardsConfig(masked_limit=0.2), notes.append)
    for _ in range(20):
        watch.observe(groups("some", 45, 0) + groups("some", 1, 8))
    assert len(notes) == 2


def test_unreadable_answers_are_told_of_and_end_a_run_only_when_nearly_all_of_many_are() -> None:
    notes: list[str] = []
    watch = VerifierHealth(RewardsConfig(unreadable_warning=0.2, unreadable_limit=0.9), notes.append)
    unread = [replace(group, unreadable=8, unreadable_reason="no JSON") for group in groups("odd", LOOK_BACK, 0)]
    watch.observe(unread[: LOOK_BACK - 1])
    assert len(notes) == 1 and "'odd' could not read 100.0% of the completions" in notes[0] and "no JSON" in notes[0]
    with pytest.raises(RunError, match=r"'odd' could not read 100\.0%.*rewards.unreadable_limit \(90%\); .*no JSON"):
        watch.observe(unread[-1:])


def test_a_run_whose_verifier_is_mute_stops_with_a_checkpoint() -> None:
    class Mute(World):
        def score(self, rollout: tuple[int, list[Prompt]]) -> WaveReport:
            report = super().score(rollout)
            statuses = (RewardStatus.TIMEOUT,) * 2
            mute = tuple(replace(group, statuses=statuses, reason="mute") for group in report.groups)
            return replace(report, groups=mute)

    stage = Stage(config(), Mute())
    with pytest.raises(RunError, match=r"verifier of task 't' gave no verdict on 100\.0%.*mute"):
        stage.run()
    assert stage.notes.checkpoints[-1][0] == stage.admission.version > 0
