"""The workers of a run behind one face: Ray actors, or the same objects in this process.

`call` gives a reference (Ray) or the value itself (inline); references are passed on as arguments
unresolved, so that data goes from worker to worker and never through the driver.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Reference = Any


class StuckError(RuntimeError):
    """A remote wait outlasted its deadline; the message names the stage."""


class Handle(Protocol):
    """One worker."""

    name: str

    def call(self, method: str, *args: Any, returns: int = 1, **kwargs: Any) -> Reference:
        """Starts a method; with `returns` above 1, a reference for each of its values."""
        ...


@dataclass
class Inline:
    """A worker in this process: calls run at once."""

    name: str
    worker: Any

    def call(self, method: str, *args: Any, returns: int = 1, **kwargs: Any) -> Reference:
        """Runs a method and returns its value."""
        return getattr(self.worker, method)(*args, **kwargs)


@dataclass
class Fleet:
    """All workers of a run.  `experts` are in the router's order."""

    experts: Sequence[Handle]
    rollouts: Sequence[Handle]
    rewards: Sequence[Handle]
    learners: Sequence[Handle]
    deadline_s: float

    def encode(self, prompts: Sequence[Any]) -> list[Reference]:
        """Every expert's features of some prompts."""
        messages = [prompt.messages for prompt in prompts]
        return [expert.call("encode", messages) for expert in self.experts]

    async def get(self, reference: Reference, stage: str) -> Any:
        """The value of a reference.

        Raises:
            StuckError: when it does not come within the deadline.
        """
        if not inspect.isawaitable(reference):
            return reference
        try:
            return await asyncio.wait_for(_awaited(reference), self.deadline_s)
        except TimeoutError:
            raise StuckError(f"{stage} gave no answer within {self.deadline_s:g} s") from None

    async def get_all(self, references: Sequence[Reference], stage: str) -> list[Any]:
        """The values of several references."""
        return list(await asyncio.gather(*(self.get(reference, stage) for reference in references)))

    def close(self) -> None:
        """Ends the workers."""
        for handle in [*self.rewards, *self.rollouts, *self.experts, *self.learners]:
            if isinstance(handle, Inline) and hasattr(handle.worker, "close"):
                handle.worker.close()


async def _awaited(reference: Awaitable[Any]) -> Any:
    return await reference
