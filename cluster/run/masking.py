"""Watches for verifiers that give no verdict: left alone, they would quietly take the signal away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from cluster.run.recovery import RunError
from cluster.run.scoring import GroupReport
from rollout.types import RewardStatus

LOOK_BACK = 200  # groups of a task
ENOUGH = 50  # groups of a task to judge by
WARNING = 0.01


class MaskedShare:
    """Each task's share of completions without a verdict, over its last groups.

    limit: of the share; above it the run ends.  note: tells people, once a task, that the share is over 1 %.
    """

    def __init__(self, limit: float, note: Callable[[str], None]) -> None:
        self.limit, self.note = limit, note
        self._seen: dict[str, deque[tuple[int, int]]] = {}
        self._reasons: dict[str, str] = {}
        self._warned: set[str] = set()

    def observe(self, groups: Sequence[GroupReport]) -> None:
        """Counts some scored groups.

        Raises:
            RunError: naming the task whose verifier is over the limit, and what it said last.
        """
        for group in groups:
            masked = sum(status is not RewardStatus.OK for status in group.statuses)
            self._seen.setdefault(group.task, deque(maxlen=LOOK_BACK)).append((masked, len(group.statuses)))
            if masked:
                self._reasons[group.task] = group.reason
        for task in {group.task for group in groups}:
            self._judge(task)

    def _judge(self, task: str) -> None:
        seen = self._seen[task]
        if len(seen) < ENOUGH:
            return
        share = sum(masked for masked, _ in seen) / sum(count for _, count in seen)
        what = f"the verifier of task {task!r} gave no verdict on {share:.1%} of the completions of {len(seen)} groups"
        why = f"the last reason: {self._reasons.get(task, 'none')}"
        if share > self.limit:
            remedy = "mend it, or raise rewards.timeout_s or rewards.masked_limit, and go on with --resume"
            raise RunError(f"{what}, more than rewards.masked_limit ({self.limit:.0%}); {why}; {remedy}")
        if share > WARNING and task not in self._warned:
            self._warned.add(task)
            self.note(f"{what}; {why}")
