"""Watches for verifiers that give no verdict, or cannot read answers: left alone, they quietly take the signal away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.run.recovery import RunError
from cluster.run.scoring import GroupReport
from rewards.config import RewardsConfig
from rollout.types import RewardStatus

LOOK_BACK = 200  # groups of a task
ENOUGH = 50  # groups of a task to judge by
WARNING = 0.01  # share of masked completions


@dataclass
class Share:
    """One kind of completions among each task's last groups.

    what: is said of a task's verifier.  limit: of the share; above it the run ends, once there are `enough` groups.
    setting: which sets the limit.  warning: above this share people are told, once a task.
    """

    what: str
    setting: str
    remedy: str
    warning: float
    limit: float
    enough: int
    seen: dict[str, deque[tuple[int, int]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def add(self, group: GroupReport, count: int, reason: str) -> None:
        """Counts a scored group with so many of them."""
        self.seen.setdefault(group.task, deque(maxlen=LOOK_BACK)).append((count, len(group.statuses)))
        if count:
            self.reasons[group.task] = reason

    def check(self, task: str, note: Callable[[str], None]) -> None:
        """Raises RunError above the limit; tells above the warning."""
        seen = self.seen[task]
        if len(seen) < ENOUGH:
            return
        share = sum(count for count, _ in seen) / sum(count for _, count in seen)
        what = f"the verifier of task {task!r} {self.what} {share:.1%} of the completions of {len(seen)} groups"
        why = f"the last reason: {self.reasons.get(task, 'none')}"
        if share > self.limit and len(seen) >= self.enough:
            raise RunError(f"{what}, more than {self.setting} ({self.limit:.0%}); {why}; {self.remedy}")
        if share > self.warning and task not in self.warned:
            self.warned.add(task)
            note(f"{what}; {why}")


class VerifierHealth:
    """What the verifiers of each task made of the completions of its last groups.

    note: tells people, once a task, that a share is high.
    """

    def __init__(self, config: RewardsConfig, note: Callable[[str], None]) -> None:
        self.note = note
        again = "and go on with --resume"
        self.masked = Share(
            "gave no verdict on", "rewards.masked_limit",
            f"mend it, or raise rewards.timeout_s or rewards.masked_limit, {again}",
            WARNING, config.masked_limit, ENOUGH,
        )  # fmt: skip
        self.unreadable = Share(
            "could not read", "rewards.unreadable_limit",
            f"ask for its form of answer in data.template or data.system, or raise rewards.unreadable_limit {again}",
            config.unreadable_warning, config.unreadable_limit, LOOK_BACK,
        )  # fmt: skip

    def observe(self, groups: Sequence[GroupReport]) -> None:
        """Counts some scored groups.

        Raises:
            RunError: naming the task whose verifier is over a limit, and what it said last.
        """
        for group in groups:
            masked = sum(status is not RewardStatus.OK for status in group.statuses)
            self.masked.add(group, masked, group.reason)
            self.unreadable.add(group, group.unreadable, group.unreadable_reason)
        for task in {group.task for group in groups}:
            self.masked.check(task, self.note)
            self.unreadable.check(task, self.note)
