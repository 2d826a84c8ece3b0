"""Asking the experts about a prompt, without ever failing a request because one of them is down."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from experts.expert import Encoded
from rollout.types import Message

RETRY_S = 1.0  # for another replica, after one has died
PROBE_S = 60.0
GONE = (RayError, DeploymentUnavailableError, BackPressureError, TimeoutError)


@dataclass(frozen=True)
class Seen:
    """What the experts gave for a prompt, in the router's order; None of one that gave nothing.

    missing: why, by name.
    """

    encoded: tuple[Encoded | None, ...]
    missing: Mapping[str, str]


@dataclass(eq=False)
class _Member:
    name: str
    handle: Any
    down: str = ""
    probe: asyncio.Task[None] | None = None


@dataclass
class Panel:
    """The experts behind Serve.  An expert that fails counts as missing, at once for all later requests too, until it
    answers again.

    handles: by name, in the router's order.
    timeout_s: of one expert, for one prompt.
    """

    handles: Mapping[str, Any]
    timeout_s: float
    members: list[_Member] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.members = [_Member(name, handle) for name, handle in self.handles.items()]

    @property
    def states(self) -> dict[str, str]:
        """`up`, or why an expert is down."""
        return {member.name: member.down or "up" for member in self.members}

    async def ask(self, method: str, messages: Sequence[Message], *more: Any) -> Seen:
        """What every expert gives for a prompt, all at once."""
        answers = await asyncio.gather(*(self._one(member, method, messages, *more) for member in self.members))
        encoded = tuple(answer if isinstance(answer, Encoded) else None for answer in answers)
        named = zip(self.members, answers, strict=True)
        return Seen(encoded, {member.name: answer for member, answer in named if isinstance(answer, str)})

    async def _one(self, member: _Member, method: str, *arguments: Any) -> Encoded | str:
        """The expert's answer, or why there is none."""
        if member.down:
            return member.down
        reason = ""
        for limit in (self.timeout_s, RETRY_S):
            asked = getattr(member.handle, method).remote(*arguments)
            try:
                async with asyncio.timeout(limit):
                    answer: Encoded = await asked
                    return answer
            except RayTaskError as error:
                # Its own code failed on this prompt: the expert itself is there.
                return f"failed: {_first_line(error.cause)}"
            except GONE as error:
                asked.cancel()
                if isinstance(error, TimeoutError):
                    reason = reason or "no answer in time"
                    break
                reason = "its process is gone"
            except asyncio.CancelledError:
                asked.cancel()
                raise
        if not member.down:
            member.down = reason
            member.probe = asyncio.ensure_future(self._until_back(member, method, *arguments))
        return reason

    @staticmethod
    async def _until_back(member: _Member, method: str, *arguments: Any) -> None:
        """Asks again what was not answered: an expert that hangs may still say that it is ready."""
        while member.down:
            asked = getattr(member.handle, method).remote(*arguments)
            try:
                async with asyncio.timeout(PROBE_S):
                    await asked
                member.down = ""
            except RayTaskError:
                member.down = ""  # it fails on this very prompt, but it is there
            except GONE:
                asked.cancel()
                await asyncio.sleep(RETRY_S)


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
