"""Processes that a test started, found by what they were called with."""

from __future__ import annotations

from collections.abc import Sequence

import psutil


def descendants(root: psutil.Process, *parts: str) -> list[psutil.Process]:
    """The living processes under one whose command line holds one of the parts, in any case.

    One that has just ended, or waits for its parent to ask how (a zombie), has no command line any more.
    """
    return [child for child in root.children(recursive=True) if _holds(_command(child), parts)]


def _holds(command: Sequence[str], parts: Sequence[str]) -> bool:
    return any(part.lower() in word.lower() for word in command for part in parts)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
