"""One expert's workers: which of them encodes which prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.run.fleet import Handle, Reference

SPILL = 64  # prompts that a replica may have to do more than the least loaded one


class Replicas:
    """The copies of one expert.

    A prompt goes to the copy that its text says, whose cache then knows it; when that one has much more to do than
    another, the other gets it.

    steady: only prompts of the same call count as what a copy has to do, so that who encodes what does not depend on
        how fast the copies are, and synchronous training stays the same to the last bit.
    """

    def __init__(self, handles: Sequence[Handle], spill: int = SPILL, steady: bool = False) -> None:
        self.handles, self.spill, self.steady = list(handles), spill, steady
        self._under_way: list[list[tuple[Reference, int]]] = [[] for _ in self.handles]

    def split(self, prompts: Sequence[Any], is_ready: Callable[[Reference], bool]) -> list[tuple[Handle, list[int]]]:
        """Positions of the prompts by the copy that gets them; copies without any are left out.

        is_ready: whether a call has ended.
        """
        if len(self.handles) == 1:
            return [(self.handles[0], list(range(len(prompts))))]
        for place, calls in enumerate(self._under_way):
            self._under_way[place] = [(made, count) for made, count in calls if not is_ready(made)]
        load = [sum(count for _, count in calls) for calls in self._under_way]
        chosen: list[list[int]] = [[] for _ in self.handles]
        for position, prompt in enumerate(prompts):
            place = home(prompt.key, len(self.handles))
            least = min(range(len(load)), key=load.__getitem__)
            if load[place] - load[least] >= self.spill:
                place = least
            chosen[place].append(position)
            load[place] += 1
        return [(handle, rows) for handle, rows in zip(self.handles, chosen, strict=True) if rows]

    def sent(self, handle: Handle, reference: Reference, count: int) -> None:
        """A call with so many prompts is under way."""
        if len(self.handles) > 1 and not self.steady:
            self._under_way[self.handles.index(handle)].append((reference, count))


def home(key: str, copies: int) -> int:
    """The copy that a prompt belongs to."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % copies
