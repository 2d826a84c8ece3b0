"""Scoring in a process that can be ended: a completion that makes a verifier hang, fail or run wild costs itself."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rewards import child
from rewards.child import (
    CAPACITY,
    DONE,
    LEAVING,
    LONGEST_MESSAGE,
    NO_JAIL,
    READ,
    Board,
    Item,
    Kind,
    Verdict,
    is_verdict,
)
from rewards.verify import RewardsError, is_right
from rewards.zygote import Zygote
from rollout.types import Prompt, RewardStatus, Score

LATE_IN_A_ROW = 3
NOT_ASKED = f"{LATE_IN_A_ROW} times in a row: not asked again"
SETTLE_MS = 5
READ_S = 60.0  # reading a batch takes milliseconds, but its payloads may import what they are made of
SOUND_KEPT = 100_000  # prompts
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Outcome(NamedTuple):
    """What came of an item; in doubt until it is known whether the verifier reads a right answer to its prompt."""

    score: Score
    in_doubt: bool = False


class ScoringProcess:
    """One warm process that scores one completion after another, and is replaced when one may have spoilt it."""

    def __init__(self, zygote: Zygote, timeout_s: float, reuse: int) -> None:
        """timeout_s: limit for one completion, in seconds, from the moment its scoring starts.

        reuse: number of completions after which the process is replaced.

        Raises:
            RewardsError: when no process can be started.
        """
        self._zygote, self._timeout_s, self._reuse = zygote, timeout_s, reuse
        self._sound: dict[tuple[str, str], bool] = {}
        self.restarts = -1
        self._start()

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score per item, in order; see `Item` for what an item is.

        A verifier that is late three times in a row is not asked again in this call: mute on one answer, it may
        be mute on all, and everything else would wait.

        Raises:
            RewardsError: when a new process that is needed does not start.
        """
        outcomes = self._judge(items)
        doubted = [item for item, outcome in zip(items, outcomes, strict=True) if outcome.in_doubt]
        if not doubted:
            return [outcome.score for outcome in outcomes]
        self._try_right_answers({(task, prompt.key): prompt for task, _, prompt in doubted})
        return [
            outcome.score if not outcome.in_doubt or self._sound[task, prompt.key] else _not_sound(outcome.score)
            for (task, _, prompt), outcome in zip(items, outcomes, strict=True)
        ]

    def close(self) -> None:
        """End the process and whatever it has started; may be called twice."""
        if not self._closed:
            self._end()

    def _try_right_answers(self, prompts: Mapping[tuple[str, str], Prompt]) -> None:
        """Notes for which prompts a right answer scores 1, in a process that has met no answer of a stranger."""
        if len(self._sound) > SOUND_KEPT:
            self._sound.clear()
        new = {key: prompt for key, prompt in prompts.items() if key not in self._sound}
        fresh = ScoringProcess(self._zygote, self._timeout_s, self._reuse)
        try:
            outcomes = fresh._judge([(task, None, prompt) for (task, _), prompt in new.items()])
        finally:
            fresh.close()
        for key, (score, in_doubt) in zip(new, outcomes, strict=True):
            self._sound[key] = score.status is RewardStatus.OK and not in_doubt and is_right(score.right)

    def _judge(self, items: Sequence[Item]) -> list[Outcome]:
        found: dict[int, Outcome] = {}
        waiting = list(range(len(items)))
        late: Counter[str] = Counter()
        idle_deaths = 0
        while waiting:
            if self._left <= 0:  # only now: there may be nothing more to score
                self._restart()
            answered = self._judge_until_replaced([items[i] for i in waiting[: min(CAPACITY, self._left)]])
            self._left -= len(answered)
            idle_deaths = 0 if answered else idle_deaths + 1
            if idle_deaths > 1:
                raise RewardsError(
                    f"the process that scores {self._zygote.names} ends before it has read what to score: "
                    "can it import what the prompts' payloads hold?"
                )
            found |= zip(waiting, answered, strict=False)
            done, waiting = waiting[: len(answered)], waiting[len(answered) :]
            if not waiting:
                break
            # Only the last one can be late: it ended the process.
            is_late = bool(answered) and answered[-1].score.status is RewardStatus.TIMEOUT
            for task in {items[i][0] for i in (done[:-1] if is_late else done)}:
                late[task] = 0
            if is_late:
                late[task := items[done[-1]][0]] += 1
                if late[task] >= LATE_IN_A_ROW:
                    not_tried = Outcome(_masked(RewardStatus.TIMEOUT, f"{self._late}, {NOT_ASKED}"))
                    found |= {i: not_tried for i in waiting if items[i][0] == task}
                    waiting = [i for i in waiting if i not in found]
        return [found[i] for i in range(len(items))]

    def _judge_until_replaced(self, items: list[Item]) -> list[Outcome]:
        """Outcomes of the first items: all of them, or up to the one that made a new process necessary.

        None at all when the process was gone before it had read them.
        """
        self._board.clear(len(items))
        self._reading = True
        reasons: dict[int, str] = {}
        try:
            child.send_batch(self._down, items)
            finished = self._wait(len(items), reasons)
        except TimeoutError:
            outcomes = self._cut_short(len(items), reasons, _masked(RewardStatus.TIMEOUT, self._late))
            self._restart()
            return outcomes
        except ConnectionError:
            code = self._end()
            outcomes = self._cut_short(
                len(items), reasons, _failed(f"the verifier ended its process (exit code {code})")
            )
            self._start()
            return outcomes
        except ValueError as error:  # ours says no such thing
            outcomes = self._cut_short(len(items), reasons, _failed(f"its process was taken over: {error}"))
            self._restart()
            return outcomes
        outcomes = self._outcomes(finished, reasons)
        if finished < len(items):
            self._left = 0
        if len(outcomes) < finished:
            self._left = 0
            outcomes.append(Outcome(_failed("its process was taken over: a verdict is missing")))
        return outcomes

    def _cut_short(self, count: int, reasons: Mapping[int, str], why: Score) -> list[Outcome]:
        """Outcomes up to the completion at work, which gets `why` if it has none."""
        if self._reading:
            return []
        index = min(max(self._board.at()[0], 0), count - 1)
        outcomes = self._outcomes(index + 1, reasons)
        return outcomes if len(outcomes) > index else [*outcomes, Outcome(why)]

    def _wait(self, count: int, reasons: dict[int, str]) -> int:
        """Waits until the process has done what it will do of a batch; how many completions that are.

        Raises:
            TimeoutError: a completion is late, or the batch is not read.
            ConnectionError: the process has ended.
            ValueError: it says what none of ours says.
        """
        seen, seen_at, messages = -1, time.monotonic(), 0
        while True:
            while self._poller.poll(0):
                messages += 1
                kind, index, text = child.unpack_message(self._up.recv(LONGEST_MESSAGE + 1) or _gone())
                if messages > count + 2 or index > count:
                    raise ValueError("more messages than completions")
                if kind == NO_JAIL:
                    raise RewardsError(
                        f"the process that scores {self._zygote.names} cannot be confined ({text}): "
                        "set rewards.jail: off to do without"
                    )
                if kind in (DONE, LEAVING):
                    return count if kind == DONE else index
                if kind == READ:
                    self._reading, seen, seen_at = False, 0, time.monotonic()
                else:
                    reasons[index] = text
            index, since = self._board.at()
            now = time.monotonic()
            if not self._reading and index > seen:
                seen, seen_at = index, now
                if index >= count:
                    raise ValueError("a completion that is none of the batch")
            # The process says since when it is at work, but nothing later than this one has seen it there.
            since = min(since, seen_at) if index == seen >= 0 else seen_at
            limit = READ_S if self._reading else self._timeout_s
            left = since + limit - now
            if left > 0:
                # Nobody says when the next one starts: it cannot be late before its limit has passed once.
                self._poller.poll(1000 * min(left, self._timeout_s) + 1)
            elif now - seen_at > limit or self._is_settled():
                raise TimeoutError

    def _is_settled(self) -> bool:
        """Whether what stands on the board is what it says: number and start of a completion are not one stroke."""
        before = self._board.at()
        self._poller.poll(SETTLE_MS)
        return self._board.at() == before

    def _outcomes(self, count: int, reasons: Mapping[int, str]) -> list[Outcome]:
        """Of the first so many items, as far as they have one; equal scores are one object."""
        known: dict[Verdict, Outcome] = {}
        outcomes: list[Outcome] = []
        for index, verdict in enumerate(self._board.verdicts(count)):
            outcome = known.get(verdict)
            if outcome is None:
                if not is_verdict(verdict):
                    break
                outcome = _outcome(verdict, reasons.get(index, ""))
                if verdict[0] == Kind.SCORE:
                    known[verdict] = outcome
            outcomes.append(outcome)
        return outcomes

    def _restart(self) -> None:
        self._end()
        self._start()

    def _end(self) -> int:
        """Ends the process; its exit code."""
        self._closed = True
        self._down.close()
        self._up.close()
        return self._zygote.end(self.pid)

    def _start(self) -> None:
        self._down, down = socket.socketpair()
        self._up, up = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("verdicts", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, Board.SIZE)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)  # a file that shrank would end whoever reads its memory
        self._board = Board(memory)
        try:
            self.pid = self._zygote.fork(down.fileno(), up.fileno(), memory)
        finally:
            down.close()
            up.close()
            os.close(memory)
        self._down.settimeout(READ_S)
        self._poller = select.poll()
        self._poller.register(self._up, select.POLLIN)
        self._left, self._closed = self._reuse, False
        self.restarts += 1

    @property
    def _late(self) -> str:
        return f"no verdict within {self._timeout_s:g} s"


def _gone() -> bytes:
    raise ConnectionResetError("the scoring process has gone")


def _outcome(verdict: Verdict, reason: str) -> Outcome:
    kind, reward, answer = verdict
    if kind == Kind.FAILED:
        return Outcome(_failed(reason))
    if kind == Kind.SCORE:
        return Outcome(Score(reward=reward, answer=answer))
    return Outcome(Score(reward=reward, answer=answer, unreadable=True, reason=reason), kind == Kind.DOUBTFUL)


def _not_sound(score: Score) -> Score:
    return _failed(f"{score.reason}, and no right answer is known that it reads")


def _failed(reason: str) -> Score:
    return _masked(RewardStatus.ERROR, reason)


def _masked(status: RewardStatus, reason: str) -> Score:
    return Score(reward=0.0, answer=0.0, status=status, reason=reason)
