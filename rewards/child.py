"""The scoring process: `zygote.py` forks it, `pool.py` feeds it and ends it.

Messages.  Batches of (task, completion, prompt) come in, pickled by the owner.  Out go fixed records alone: verdicts in
memory that both processes see (`Board`), with the time at which scoring of a completion started, and short messages (a
byte, a number and some text) for the end of a batch and for reasons.  A completion may have taken this process over, so
nothing that comes out of it is unpickled, and the owner checks all of it.

The process leaves after a completion whose scoring raised something unexpected, which may have left anything behind,
and after one that ran out of memory; another one goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import pickle
import resource
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from numbers import Real

from rewards import jail
from rewards.verifiers import WeightedSum
from rewards.verify import READING_ERRORS, SelfTesting, Unreadable, Verifier
from rollout.types import Prompt

# A task, a completion (None: one that its verifier knows to be right) and a prompt.
Item = tuple[str, str | None, Prompt]
CAPACITY = 4096  # completions a batch
REASON_LENGTH = 300  # characters
LENGTH = struct.Struct("<Q")  # in front of a batch: its bytes
_PR_SET_PDEATHSIG = 1
_MESSAGE = struct.Struct("<cI")
LONGEST_MESSAGE = _MESSAGE.size + 4 * REASON_LENGTH
OPEN_FILES = 256
LOOK_S = 0.1  # between two looks at the processor time used: each costs a tenth of a cheap verifier
_SPARE = 4 * 2**20  # bytes to say in that there is no memory left
_OUTSIDE_DATA = 2**30  # bytes of shared memory and of libraries that scoring may map besides


class Kind(IntEnum):
    """What came of a completion.

    DOUBTFUL: a verifier that knows right answers failed to read this one; a fresh process says whose fault it is.
    """

    NONE = 0
    SCORE = 1
    UNREADABLE = 2
    DOUBTFUL = 3
    FAILED = 4


Verdict = tuple[int, float, float]  # of a `Kind`, with the reward and the answer's own score
READ, DONE, REASON, LEAVING, NO_JAIL = b"R", b"D", b"W", b"L", b"J"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a scoring process may have.

    memory: bytes beside what is there when the verifiers are loaded.  cpu_s: seconds of processor time in all; with
    half of them used it leaves after the completion at work.  jailed: whether it is confined, too, as far as `kernel`
    can do it.  readable: files and folders that it may then open.
    """

    memory: int
    cpu_s: int
    jailed: bool
    kernel: jail.Kernel
    readable: tuple[str, ...] = ()


class Board:
    """Memory that the scoring process writes and its owner reads: who is at work since when, and the verdicts.

    The owner believes nothing that stands here: a completion may have written it.
    """

    _AT = struct.Struct("<qd")
    _VERDICT = struct.Struct("<qdd")
    SIZE = _AT.size + CAPACITY * _VERDICT.size

    def __init__(self, descriptor: int) -> None:
        """descriptor: of a file in memory of `SIZE` bytes."""
        self._memory = mmap.mmap(descriptor, self.SIZE)

    def clear(self, count: int) -> None:
        """A new batch of so many completions, none of which was looked at."""
        self._memory[: self._AT.size] = self._AT.pack(-1, 0.0)
        self._memory[self._AT.size : self._AT.size + count * self._VERDICT.size] = bytes(count * self._VERDICT.size)

    def start(self, index: int) -> float:
        """Scoring of a completion starts; at what time (`time.monotonic`)."""
        now = time.monotonic()
        self._AT.pack_into(self._memory, 0, index, now)
        return now

    def at(self) -> tuple[int, float]:
        """The completion at work, -1 for none yet, and since when (`time.monotonic`)."""
        index, since = self._AT.unpack_from(self._memory, 0)
        return index, since

    def put(self, index: int, verdict: Verdict) -> None:
        """What came of a completion."""
        self._VERDICT.pack_into(self._memory, self._AT.size + index * self._VERDICT.size, *verdict)

    def verdicts(self, count: int) -> Iterator[Verdict]:
        """What came of the first so many completions; see `is_verdict`."""
        return self._VERDICT.iter_unpack(self._memory[self._AT.size : self._AT.size + count * self._VERDICT.size])


def is_verdict(verdict: Verdict) -> bool:
    """Whether it is what a scoring process writes of a completion that it has looked at."""
    kind, reward, answer = verdict
    return Kind.NONE < kind <= Kind.FAILED and math.isfinite(reward) and math.isfinite(answer)


def pack_message(kind: bytes, index: int, text: str = "") -> bytes:
    """A message to the owner."""
    return _MESSAGE.pack(kind, index) + text[:REASON_LENGTH].encode(errors="replace")


def unpack_message(message: bytes) -> tuple[bytes, int, str]:
    """Kind, index and text of a message; the text has no character that does anything on a terminal.

    Raises:
        ValueError: when it is none that a scoring process sends.
    """
    if not _MESSAGE.size <= len(message) <= LONGEST_MESSAGE:
        raise ValueError(f"a message of {len(message)} bytes")
    kind, index = _MESSAGE.unpack_from(message)
    if kind not in (READ, DONE, REASON, LEAVING, NO_JAIL) or index > CAPACITY:
        raise ValueError("a message of no known kind")
    text = message[_MESSAGE.size :].decode(errors="replace")
    return kind, index, "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def main(down: int, up: int, board: int, limits: Limits, verifiers: Mapping[str, Verifier]) -> None:
    """Score until the other end goes away; for a process that was just forked and has one thread.

    down: descriptor of the socket that batches come from.  up: of the one that messages go to.  board: of the memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's
    spare = mmap.mmap(-1, _SPARE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    seen = Board(board)
    os.close(board)
    _limit(limits)
    if limits.jailed:
        try:
            jail.confine(limits.readable, limits.kernel)
        except OSError as error:
            os.write(up, pack_message(NO_JAIL, 0, str(error)))
            return
    _score(down, up, seen, verifiers, limits.cpu_s / 2, spare)


def die_with_parent(parent: int) -> None:
    """End with the thread that forked this process, even inside a verifier that never returns."""
    if hasattr(os, "uname") and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _limit(limits: Limits) -> None:
    """A verifier that eats memory or time fails by itself, before the machine does."""
    with open("/proc/self/status") as status:
        held = {name: int(value.split()[0]) * 1024 for name, value in _sizes(status.read())}
    bounds = {
        resource.RLIMIT_DATA: held["VmData"] + limits.memory,
        resource.RLIMIT_AS: held["VmSize"] + limits.memory + _OUTSIDE_DATA,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_CORE: 0,
    }
    if limits.jailed:
        bounds |= {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NOFILE: OPEN_FILES}
    for which, bound in bounds.items():
        _, hard = resource.getrlimit(which)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(which, (bound, bound))


def _sizes(status: str) -> list[tuple[str, str]]:
    rows = (line.split(":", 1) for line in status.splitlines() if line.startswith("Vm"))
    return [(row[0], row[1]) for row in rows]


def _score(down: int, up: int, board: Board, verifiers: Mapping[str, Verifier], cpu_s: float, spare: mmap.mmap) -> None:
    first, looked = True, 0.0
    while (batch := _receive(down)) is not None:
        items: list[Item] = pickle.loads(batch)
        os.write(up, pack_message(READ, 0))
        for index, (task, completion, prompt) in enumerate(items):
            began = board.start(index)
            if began > looked + LOOK_S:
                looked = began
                if time.process_time() > cpu_s:
                    os.write(up, pack_message(LEAVING, index))
                    return
            try:
                verdict, reason = _verdict(verifiers[task], completion, prompt)
            except MemoryError as error:
                with contextlib.suppress(BufferError):
                    spare.close()
                if first:  # else completions before it may have kept the memory: a new process tries it
                    os.write(up, pack_message(REASON, index, reason_of(error)))
                    board.put(index, (Kind.FAILED, 0.0, 0.0))
                os.write(up, pack_message(LEAVING, index + first))
                return
            if reason:
                os.write(up, pack_message(REASON, index, reason))
            board.put(index, verdict)
            if verdict[0] == Kind.FAILED:
                os.write(up, pack_message(LEAVING, index + 1))
                return
            first = False
        os.write(up, pack_message(DONE, 0))


def _receive(down: int) -> bytes | None:
    """The next batch; None when the owner has gone."""
    head = _read(down, LENGTH.size)
    return None if head is None else _read(down, LENGTH.unpack(head)[0])


def _read(down: int, count: int) -> bytes | None:
    found = bytearray()
    while len(found) < count:
        part = os.read(down, min(count - len(found), 2**20))
        if not part:
            return None
        found += part
    return bytes(found)


def send_batch(down: socket.socket, items: list[Item]) -> None:
    """The owner's side of `_receive`; waits as long as the socket's time-out says.

    Raises:
        OSError: when the scoring process has gone, or does not take it (TimeoutError).
    """
    batch = pickle.dumps(items)
    down.sendall(LENGTH.pack(len(batch)) + batch)


def _verdict(verifier: Verifier, completion: str | None, prompt: Prompt) -> tuple[Verdict, str]:
    """What a verifier says, and why if it says nothing.  Raises MemoryError alone, whatever the verifier raises."""
    try:
        if not isinstance(verifier, WeightedSum):
            kind, score, reason = _answer(verifier, completion, prompt)
            return (kind, score, score), reason
        kind, score, reason = _answer(verifier.answer, completion, prompt)
        reward, score = verifier.total(score, completion or "", prompt)
        if not math.isfinite(reward):
            return (Kind.FAILED, 0.0, 0.0), f"its terms add up to {reward}"
        return (kind, reward, score), reason
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever others' code does is one completion's affair
        return (Kind.FAILED, 0.0, 0.0), reason_of(error)


def _answer(verifier: Verifier, completion: str | None, prompt: Prompt) -> tuple[Kind, float, str]:
    """The answer's own score; 0 for one that cannot be read."""
    if completion is None:
        completion = verifier.known_good(prompt) if isinstance(verifier, SelfTesting) else None
        if completion is None:
            raise LookupError("no right answer is known")
    try:
        score: object = verifier.score(completion, prompt)  # a promise that others' code may not keep
    except Unreadable as error:
        return Kind.UNREADABLE, 0.0, reason_of(error)
    except READING_ERRORS as error:
        if not isinstance(verifier, SelfTesting):
            raise
        return Kind.DOUBTFUL, 0.0, reason_of(error)
    if type(score) is not float:  # isinstance with an abstract class takes as long as a cheap verifier
        if not isinstance(score, Real):
            raise ValueError(f"returned {score!a}, not a finite number")
        score = float(score)
    if not math.isfinite(score):
        raise ValueError(f"returned {score}, not a finite number")
    return Kind.SCORE, score, ""


def reason_of(error: BaseException) -> str:
    """An exception in at most `REASON_LENGTH` characters."""
    name = type(error).__name__
    try:
        text = " ".join(f"{name}: {error}"[: 4 * REASON_LENGTH].split())
    except MemoryError:
        return name
    except BaseException:  # noqa: BLE001 - an exception's own text is others' code, too
        text = name
    return text[:REASON_LENGTH]
