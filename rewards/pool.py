"""Scoring in a process that can be killed: a verifier that hangs or dies costs one completion."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Pipe

from rewards.child import CAPACITY, DONE, READY, Board, Item, Verdict
from rewards.verify import RewardsError, Verifier
from rollout.types import RewardStatus, Score

LATE_IN_A_ROW = 3
NOT_ASKED = f"{LATE_IN_A_ROW} times in a row: not asked again"
SETTLE_MS = 5
START_S = 180.0  # a cold import of a large verifier library on a loaded machine stays well below this


class ScoringProcess:
    """One warm process that scores one completion after another.

    It ends with the THREAD that started it (Linux ties a child to the thread), so an owner should
    call it from one lasting thread.
    """

    def __init__(self, verifiers: Mapping[str, Verifier], timeout_s: float, memory_mb: float) -> None:
        """verifiers: by task name, importable where a new Python with this one's `sys.path` starts.

        timeout_s: limit for one completion, in seconds, from the moment its scoring starts.
        memory_mb: that scoring may take, beside what the process holds when it is ready.

        Raises:
            RewardsError: when the verifiers cannot be pickled or loaded in the new process.
        """
        try:
            self._pickled = pickle.dumps(dict(verifiers))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RewardsError(f"the verifiers of {list(verifiers)} cannot be pickled: {error}") from error
        self._names = list(verifiers)
        self._timeout_s, self._memory = timeout_s, int(memory_mb * 2**20)
        self.restarts = -1
        self._start()

    @property
    def pid(self) -> int:
        """Process id of the scoring process that is running now."""
        return self._process.pid

    def score(self, items: Sequence[Item]) -> list[Score]:
        """One score per item, in order; see `Item` for what an item is.

        A verifier that is late three times in a row is not asked again in this call: mute on one answer, it may
        be mute on all, and everything else would wait.

        Raises:
            RewardsError: when a new process that is needed after a time-out does not start.
        """
        scores: dict[int, Score] = {}
        waiting = list(range(len(items)))
        late: Counter[str] = Counter()
        idle_deaths = 0
        while waiting:
            answered = self._score_until_restart([items[i] for i in waiting[:CAPACITY]])
            idle_deaths = 0 if answered else idle_deaths + 1
            if idle_deaths > 1:
                raise RewardsError(
                    f"the process that scores {self._names} ends before it starts on a completion; "
                    "its standard error says why (can it import what the prompts' payloads hold?)"
                )
            for i, score in zip(waiting, answered, strict=False):
                scores[i], task = score, items[i][0]
                late[task] = late[task] + 1 if score.status is RewardStatus.TIMEOUT else 0
            waiting = waiting[len(answered) :]
            hopeless = {task for task, count in late.items() if count >= LATE_IN_A_ROW}
            not_tried = f"no verdict within {self._timeout_s:g} s, {NOT_ASKED}"
            scores |= {i: _masked(RewardStatus.TIMEOUT, not_tried) for i in waiting if items[i][0] in hopeless}
            waiting = [i for i in waiting if i not in scores]
        return [scores[i] for i in range(len(items))]

    def close(self) -> None:
        """End the process and whatever it has started; may be called twice."""
        self._connection.close()
        if self._process.returncode is None:
            # Also when it is gone already: what it has started may still be there.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _score_until_restart(self, items: Sequence[Item]) -> list[Score]:
        """Scores of the first items: all of them, or up to the one that made a new process necessary.

        None at all when the process was gone before it started on the first one.
        """
        self._board.clear(len(items))
        reasons: dict[int, str] = {}
        began = time.monotonic()
        try:
            self._connection.send(list(items))
            while not self._is_done(reasons):
                index, since = self._board.at()
                # Before the first one the batch is still being read, which is no verifier's fault.
                limit, since = (START_S, began) if index < 0 else (self._timeout_s, since)
                left = since + limit - time.monotonic()
                if left > 0:
                    # Nobody says when the first one starts: it cannot be late before its limit has passed once.
                    self._poller.poll(1000 * min(left, self._timeout_s) + 1)
                elif self._is_stuck_at(index, reasons):
                    finished = self._scores(index, reasons)
                    self._restart()
                    late = _masked(RewardStatus.TIMEOUT, f"no verdict within {self._timeout_s:g} s")
                    return [*finished, late] if index >= 0 else []
        except (EOFError, ConnectionError):
            self.close()  # an exit under way keeps its code
            reason = f"the verifier ended its process (exit code {self._process.returncode})"
            index = self._board.at()[0]
            finished = self._scores(index + 1, reasons)
            self._start()
            return finished if len(finished) > index else [*finished, _masked(RewardStatus.ERROR, reason)]
        return self._scores(len(items), reasons)

    def _is_done(self, reasons: dict[int, str]) -> bool:
        """Takes the messages that are there; whether the last one was among them."""
        while self._poller.poll(0):
            message = self._connection.recv()
            if message == DONE:
                return True
            reasons[message[0]] = message[1]
        return False

    def _is_stuck_at(self, index: int, reasons: dict[int, str]) -> bool:
        """Whether that completion is really late: its number and its start are not written in one stroke."""
        since = self._board.at()[1]
        self._poller.poll(SETTLE_MS)
        return self._board.at() == (index, since) and self._board.get(max(index, 0), reasons) is None

    def _scores(self, count: int, reasons: dict[int, str]) -> list[Score]:
        """Of the first so many items, as far as they have one; equal scores are one object."""
        known: dict[Verdict, Score] = {}
        scores = []
        for index in range(count):
            verdict = self._board.get(index, reasons)
            if verdict is None:
                break
            if verdict not in known:
                known[verdict] = _score(verdict)
            scores.append(known[verdict])
        return scores

    def _restart(self) -> None:
        self.close()
        self._start()

    def _start(self) -> None:
        """Start a process and wait until it has loaded the verifiers."""
        # Not multiprocessing: its `spawn` runs the caller's main module again, which under Ray is Ray's own worker.
        self._connection, theirs = Pipe()
        memory = os.memfd_create("verdicts")
        os.ftruncate(memory, Board.SIZE)
        self._board = Board(memory)
        paths = [os.path.abspath(path) for path in sys.path]
        call = f"import sys; sys.path[:] = {paths!r}; from rewards.child import main"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{call}; main({theirs.fileno()}, {memory}, {os.getpid()}, {self._memory})"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), memory],
            start_new_session=True,  # so that a kill takes along what a verifier has started
        )
        theirs.close()
        os.close(memory)
        self._poller = select.poll()  # Connection.poll would set up a new one for every completion
        self._poller.register(self._connection, select.POLLIN)
        self.restarts += 1
        self._handshake()

    def _handshake(self) -> None:
        try:
            self._connection.send_bytes(self._pickled)
            answer = self._connection.recv() if self._connection.poll(START_S) else f"it was silent for {START_S:g} s"
        except (EOFError, ConnectionError):
            self.close()
            answer = f"it ended with exit code {self._process.returncode}"
        if answer != READY:
            self.close()
            raise RewardsError(f"the process that scores {self._names} did not start: {answer}")


def _score(verdict: Verdict) -> Score:
    if isinstance(verdict, str):
        return _masked(RewardStatus.ERROR, verdict)
    return Score(reward=verdict[0], answer=verdict[1])


def _masked(status: RewardStatus, reason: str) -> Score:
    return Score(reward=0.0, answer=0.0, status=status, reason=reason)
