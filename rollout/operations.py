"""What an answer cost, in floating-point operations."""

from __future__ import annotations

from typing import NamedTuple


class Operations(NamedTuple):
    """Floating-point operations, estimated as 2 for every parameter and token that goes through a model.

    experts, cold: of the experts, and what they would be without a cache.  policy: of reading and answering, and of the
    router's prefixes (these counted by torch).
    """

    experts: float
    cold: float
    policy: float


NO_OPERATIONS = Operations(0.0, 0.0, 0.0)
