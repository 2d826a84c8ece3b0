"""What the doctor says of one thing that it looked at."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `remedy` says what to do where `ok` is False."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
