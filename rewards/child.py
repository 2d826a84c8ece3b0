"""The scoring process: `pool.py` starts it, feeds it and kills it.

It imports no torch, so that a new one is ready soon after a kill.

Messages.  First the pickled verifiers come in, and out goes "ready" or the reason why not.  Then per batch a list of
(task, completion, prompt) comes in; verdicts go into memory that both processes see (`Board`), with the time at which
scoring of a completion started, and one message says that the batch is done.  A message for every completion took
several times as long as a cheap verifier.

A process that ran out of memory ends: what others' code has kept would be missing for every later completion.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import pickle
import resource
import signal
import struct
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from numbers import Real

from rewards.verifiers import WeightedSum
from rewards.verify import Verifier
from rollout.types import Prompt

Item = tuple[str, str, Prompt]
Verdict = tuple[float, float] | str  # the reward and the answer's own score, or why there is none
READY, DONE = "ready", "done"
CAPACITY = 4096  # completions a batch
_PR_SET_PDEATHSIG = 1
_REASON_LENGTH = 300
_LIMITS = resource.getrlimit(resource.RLIMIT_DATA)  # before a verifier's


class Board:
    """Memory that the scoring process writes and its owner reads: who is at work since when, and the verdicts.

    Numbers are here; the reasons of those without any come as messages.
    """

    _AT = struct.Struct("<qd")
    _VERDICT = struct.Struct("<qdd")
    _NONE, _NUMBERS, _REASON = range(3)
    SIZE = _AT.size + CAPACITY * _VERDICT.size

    def __init__(self, descriptor: int) -> None:
        """descriptor: of a file in memory of `SIZE` bytes."""
        self._memory = mmap.mmap(descriptor, self.SIZE)

    def clear(self, count: int) -> None:
        """A new batch of so many completions, none of which was looked at."""
        self._memory[: self._AT.size] = self._AT.pack(-1, 0.0)
        self._memory[self._AT.size : self._AT.size + count * self._VERDICT.size] = bytes(count * self._VERDICT.size)

    def start(self, index: int) -> None:
        """Scoring of a completion starts."""
        self._AT.pack_into(self._memory, 0, index, time.monotonic())

    def at(self) -> tuple[int, float]:
        """The completion at work, -1 for none yet, and since when (`time.monotonic`)."""
        index, since = self._AT.unpack_from(self._memory, 0)
        return index, since

    def put(self, index: int, verdict: Verdict) -> None:
        """What came of a completion."""
        state, numbers = (self._REASON, (0.0, 0.0)) if isinstance(verdict, str) else (self._NUMBERS, verdict)
        self._VERDICT.pack_into(self._memory, self._AT.size + index * self._VERDICT.size, state, *numbers)

    def get(self, index: int, reasons: Mapping[int, str]) -> Verdict | None:
        """What came of a completion; None if nothing did."""
        state, reward, answer = self._VERDICT.unpack_from(self._memory, self._AT.size + index * self._VERDICT.size)
        if state == self._NUMBERS:
            return reward, answer
        return reasons.get(index) if state == self._REASON else None


def main(descriptor: int, board: int, parent: int, memory: int) -> None:
    """Score until the other end of the connection goes away.

    descriptor: of this process's end of the connection.
    board: descriptor of the board's memory.
    parent: process id of whoever started this one.
    memory: bytes that scoring may take beside what is there when the verifiers are loaded.
    """
    _die_with(parent)
    connection: Connection[object, object] = Connection(descriptor)
    try:
        verifiers = _load(connection)
        if verifiers is not None:
            _limit_memory(memory)
            _score(connection, Board(board), verifiers)
    except (EOFError, ConnectionError):
        return


def _die_with(parent: int) -> None:
    """End with the parent, even inside a verifier that never returns; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGKILL") and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started scoring is gone")


def _limit_memory(extra: int) -> None:
    """A verifier that eats memory fails by itself, before the machine does."""
    with open("/proc/self/status") as status:
        held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + extra, _LIMITS[1]))


def _load(connection: Connection[object, object]) -> dict[str, Verifier] | None:
    pickled = connection.recv_bytes()
    try:
        verifiers: dict[str, Verifier] = pickle.loads(pickled)
    except Exception as error:  # noqa: BLE001 - any import can fail in any way; the parent reports it
        connection.send(_reason(error))
        return None
    connection.send(READY)
    return verifiers


def _score(connection: Connection[object, object], board: Board, verifiers: Mapping[str, Verifier]) -> None:
    first = True
    while True:
        items: list[Item] = connection.recv()  # type: ignore[assignment]
        for index, (task, completion, prompt) in enumerate(items):
            board.start(index)
            try:
                _tell(connection, board, index, _verdict(verifiers[task], completion, prompt))
            except MemoryError as error:
                resource.setrlimit(resource.RLIMIT_DATA, _LIMITS)  # no room is left to say so
                if first:
                    _tell(connection, board, index, _reason(error))
                else:
                    board.start(index - 1)  # completions before it may have kept the memory: a new process tries it
                os.killpg(os.getpid(), signal.SIGKILL)
            first = False
        connection.send(DONE)


def _tell(connection: Connection[object, object], board: Board, index: int, verdict: Verdict) -> None:
    if isinstance(verdict, str):
        connection.send((index, verdict))
    board.put(index, verdict)


def _verdict(verifier: Verifier, completion: str, prompt: Prompt) -> Verdict:
    """Raises MemoryError alone, whatever the verifier raises."""
    try:
        if isinstance(verifier, WeightedSum):
            reward, answer = verifier.judge(completion, prompt)
            return (float(reward), answer) if math.isfinite(reward) else f"its terms add up to {reward}"
        score: object = verifier.score(completion, prompt)  # a promise that others' code may not keep
        if isinstance(score, Real) and math.isfinite(number := float(score)):
            return number, number
        return f"returned {score!a}, not a finite number"[:_REASON_LENGTH]
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever others' code does is one completion's affair
        return _reason(error)


def _reason(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_LENGTH]
    return text.encode(errors="replace").decode()  # half a surrogate pair in it could not be sent
