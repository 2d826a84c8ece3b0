"""A run as a process of this machine, with its output in a file.

Runs are forked from one server process that has imported what every run needs: for tiny models, importing torch,
transformers and DeepSpeed anew is a tenth of a run.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path


class Launched:
    """One command `musketeers train`, in a process and a session of its own.

    Args:
        log: file that its output is added to.
    """

    def __init__(self, recipe: Path, overrides: Sequence[str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["musketeers", "train", str(recipe), *overrides, "--auto-resume"]
        self._process = _server().Process(target=_train, args=(str(log), arguments))
        self._process.start()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._process.exitcode is not None

    @property
    def succeeded(self) -> bool:
        """Whether it has ended well."""
        return self._process.exitcode == 0

    @property
    def said(self) -> str:
        """The last line of its output."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'nothing'} (all of it: {self.log})"

    def stop(self) -> None:
        """Asks it to end with a checkpoint."""
        if self._process.pid is not None and not self.over:
            os.kill(self._process.pid, signal.SIGINT)

    def wait(self, limit_s: float) -> None:
        """Until it has ended, or for so long."""
        self._process.join(limit_s)


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cluster.run.imported"])
    return context


def _train(log: str, arguments: list[str]) -> None:
    # In a session of its own: Ctrl-C reaches the sweep alone, which then stops its runs once.
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = arguments
    from cluster.cli import main

    main()
