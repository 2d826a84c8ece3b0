"""What went wrong in a Ray call, and whose fault it was.

A dead expert surfaces as an error of the rollout worker that waited for its features: an error is
blamed on the actor found by walking its causes, not on the one that reported it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any, Literal

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayError, RayTaskError

from cluster.run.fleet import Fault, Fleet, Handle, Reference, StuckError

STACK_MARK = "Current thread"  # the one that took the signal: an actor's main thread, which runs its methods
STACK_LINES = 1000
STACK_WAIT_S = 20.0
STATE_S = 20  # for an answer of Ray's state API, which on a busy machine may take several seconds
LONGEST_S = 30.0  # until a process to send a signal has started
LOG_LINES = 40
LOG_WAIT_S = 20.0
ACTOR_ID = re.compile(r"actor_id=([0-9a-f]+)")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
RAYS_MARKS = re.compile(r"^:(job_id|actor_name|task_name):.*\n?", re.MULTILINE)
AN_ERROR = re.compile(r"\b\w*(Error|Exception)(: \S|$)")


def answer_stack_requests() -> None:
    """Makes this process write the stacks of its threads to its log on SIGUSR1, even when it hangs."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)


class RayBackend:
    """The backend of actors."""

    errors: tuple[type[Exception], ...] = (RayError, StuckError)
    survives = True

    def fault(self, error: Exception, fleet: Fleet) -> Fault:
        """See `Backend`."""
        causes = list(_causes(error))
        handles: dict[str, Handle] = {getattr(handle, "actor_id", ""): handle for handle in fleet.workers}
        replaced = {old: handle.name for handle in fleet.workers for old in getattr(handle, "replaced", ())}
        # Ray wraps a death in an error that is a task's and the actor's at once: the innermost says what happened.
        for cause in reversed(causes):
            if isinstance(cause, RayActorError):
                gone = cause.actor_id or ""
                if gone in replaced:
                    return Fault("replaced", replaced[gone], _line(cause))
                handle = handles.get(gone)
                return Fault("died", handle.name if handle else "", _line(cause), handle)
        for cause in causes:
            if isinstance(cause, (ObjectLostError, NodeDiedError)):
                return Fault("lost", "", _line(cause))
        if isinstance(error, StuckError):
            return Fault("stuck", "", str(error))
        task = next((cause for cause in reversed(causes) if isinstance(cause, RayTaskError)), None)
        # An error that Ray hands over has neither its actor nor its traceback as attributes, but its text has both; of
        # calls within calls the innermost stands last.
        trace = COLOURS.sub("", str(task)).strip() if task else ""
        blamed = handles.get(next(reversed(ACTOR_ID.findall(trace)), ""))
        reason = causes[-1]
        detail = f"{type(reason).__name__}: {_line(reason)}"
        return Fault("raised", blamed.name if blamed else "", detail, blamed, trace)

    def restart(self, handle: Any) -> None:
        """See `Backend`."""
        handle.restart()

    def is_ready(self, reference: Reference) -> bool:
        """See `Backend`."""
        import ray

        return bool(ray.wait([reference], timeout=0, fetch_local=False)[0])

    def put(self, value: Any) -> Reference:
        """See `Backend`."""
        import ray

        return ray.put(value)

    def stack(self, handle: Any) -> str:
        """See `Backend`; takes a few seconds."""
        before = _log(handle, STACK_LINES).count(STACK_MARK)
        if not _signal(handle, signal.SIGUSR1):
            return ""
        deadline = time.monotonic() + STACK_WAIT_S
        while time.monotonic() < deadline:
            log = _log(handle, STACK_LINES)
            if log.count(STACK_MARK) > before:
                return log[log.rfind(STACK_MARK) :]
            time.sleep(0.1)
        return ""

    def log_tail(self, handle: Any) -> str:
        """See `Backend`; of what it printed only the last errors: vLLM's engines print theirs."""
        printed = [line for line in _log(handle, STACK_LINES, "out").splitlines() if AN_ERROR.search(line)]
        return "\n".join([*printed[-LOG_LINES:], _log(handle, LOG_LINES)]).strip()


def _log(handle: Any, lines: int, stream: Literal["out", "err"] = "err") -> str:
    """The end of what an actor wrote, from whatever node it is on; asked again while Ray cannot say.

    A cluster that has just started, on a busy machine, may know of an actor's death before it can find its log.
    """
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    ends = time.monotonic() + LOG_WAIT_S
    while True:
        with contextlib.suppress(RayStateApiException, RayError, OSError):
            parts = get_log(
                actor_id=handle.actor_id,
                suffix=stream,
                tail=lines,
                address=_own_cluster(),
                timeout=STATE_S,
                errors="replace",
            )
            return RAYS_MARKS.sub("", "".join(parts)).strip()
        if time.monotonic() > ends:
            return ""
        time.sleep(0.5)


def _own_cluster() -> str:
    """This process's cluster: left to itself, Ray's state API asks whichever it finds first on the machine."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _kill(pid: int, number: int) -> None:
    os.kill(pid, number)


def _signal(handle: Any, number: int) -> bool:
    """Sends a signal to an actor's process, on whatever node it is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from ray.util.state import get_actor
    from ray.util.state.exception import RayStateApiException

    try:
        actor = get_actor(handle.actor_id, address=_own_cluster(), timeout=STATE_S)
        if actor is None or not actor.pid:
            return False
        there = NodeAffinitySchedulingStrategy(actor.node_id, soft=False)
        send = ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there)
        ray.get(send.remote(actor.pid, number), timeout=LONGEST_S)
    except (RayStateApiException, RayError, OSError):
        return False
    return True


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "cause", None)
        current = inner if isinstance(inner, BaseException) else current.__cause__


def _line(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
