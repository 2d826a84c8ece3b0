"""The scoring process: `pool.py` starts it, feeds it and kills it.

It imports no torch, so that a new one is ready soon after a kill.

Messages.  First the pickled verifiers come in, and out goes "ready" or the reason why not.  Then per
batch a list of (task, completion, prompt) comes in, and out goes one short message whenever scoring of
a completion starts, with the verdict on the one before, and a last one with the verdict on the last.
"""

from __future__ import annotations

import ctypes
import math
import os
import pickle
import signal
import struct
from collections.abc import Mapping
from multiprocessing.connection import Connection
from numbers import Real

from rewards.verifiers import WeightedSum
from rewards.verify import Verifier
from rollout.types import Prompt

Item = tuple[str, str, Prompt]
Verdict = tuple[float, float] | str  # the reward and the answer's own score, or why there is none
READY = "ready"
NOTHING_YET = "nothing yet"
_NUMBERS = struct.Struct("<cdd")
_PR_SET_PDEATHSIG = 1
_REASON_LENGTH = 300


def main(descriptor: int, parent: int) -> None:
    """Score until the other end of the connection goes away.

    descriptor: of this process's end of the connection.
    parent: process id of whoever started this one.
    """
    _die_with(parent)
    connection: Connection[object, object] = Connection(descriptor)
    try:
        verifiers = _load(connection)
        while verifiers is not None:
            _score(connection, verifiers)
    except (EOFError, ConnectionError):
        return


def _die_with(parent: int) -> None:
    """End with the parent, even inside a verifier that never returns; leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGKILL") and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started scoring is gone")


def _load(connection: Connection[object, object]) -> dict[str, Verifier] | None:
    pickled = connection.recv_bytes()
    try:
        verifiers: dict[str, Verifier] = pickle.loads(pickled)
    except Exception as error:  # noqa: BLE001 - any import can fail in any way; the parent reports it
        connection.send(_reason(error))
        return None
    connection.send(READY)
    return verifiers


def _score(connection: Connection[object, object], verifiers: Mapping[str, Verifier]) -> None:
    items: list[Item] = connection.recv()  # type: ignore[assignment]
    verdict: Verdict = NOTHING_YET
    for task, completion, prompt in items:
        connection.send_bytes(pack(verdict))
        verdict = _verdict(verifiers[task], completion, prompt)
    connection.send_bytes(pack(verdict))


def pack(verdict: Verdict) -> bytes:
    """One message: two numbers, or the reason why there are none.  Pickling it would take longer than scoring."""
    return verdict.encode() if isinstance(verdict, str) else _NUMBERS.pack(b"=", *verdict)


def unpack(message: bytes) -> Verdict:
    """What `pack` was given."""
    return _NUMBERS.unpack(message)[1:] if message[:1] == b"=" else message.decode()


def _verdict(verifier: Verifier, completion: str, prompt: Prompt) -> Verdict:
    try:
        if isinstance(verifier, WeightedSum):
            reward, answer = verifier.judge(completion, prompt)
            return (float(reward), answer) if math.isfinite(reward) else f"its terms add up to {reward}"
        score: object = verifier.score(completion, prompt)  # a promise that others' code may not keep
        if isinstance(score, Real) and math.isfinite(number := float(score)):
            return number, number
        return f"returned {score!a}, not a finite number"[:_REASON_LENGTH]
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever others' code does is one completion's affair
        return _reason(error)


def _reason(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:_REASON_LENGTH]
    return text.encode(errors="replace").decode()  # half a surrogate pair in it could not be sent
