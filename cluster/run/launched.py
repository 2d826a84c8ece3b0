"""A run as a process of this machine, with its output in a file.

Runs are forked from one server process that has imported what every run needs: for tiny models, importing torch,
transformers and DeepSpeed anew is a tenth of a run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil

import cluster

POLL_S = 0.5
STOP_S = 900.0  # for a step and its checkpoint
LOST = 255  # how multiprocessing says that the server is gone, and with it the exit status

# The server imports this project from where it is here, whatever folder it starts in; looking for GPUs leaves a
# process from which none that uses them can be forked, unless it is done this way.
_OF_SERVER = {
    "PYTHONPATH": str(Path(cluster.__file__).parents[1]),
    "PYTHONSAFEPATH": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class Launched:
    """One command `musketeers train`, in a process and a session of its own.

    Args:
        log: file that its output is added to.
    """

    def __init__(self, recipe: Path, overrides: Sequence[str], log: Path) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["musketeers", "train", str(recipe), *overrides, "--auto-resume"]
        self._process = _server().Process(target=_train, args=(str(log), arguments, dict(os.environ)))
        self._process.start()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        status = self._process.exitcode
        return status is not None and not (status == LOST and _alive(self._process.pid))

    @property
    def succeeded(self) -> bool:
        """Whether it has ended well."""
        return self._process.exitcode == 0

    @property
    def said(self) -> str:
        """The last line of its output."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return f"{lines[-1] if lines else 'nothing'} (all of it: {self.log})"

    def stop(self) -> None:
        """Asks it to end with a checkpoint."""
        if self._process.pid is not None and not self.over:
            os.kill(self._process.pid, signal.SIGINT)

    def wait(self, limit_s: float = STOP_S) -> None:
        """Until it has ended, or for so long."""
        deadline = time.monotonic() + limit_s
        while not self.over and time.monotonic() < deadline:
            time.sleep(POLL_S)


def _server() -> ForkServerContext:
    """Where runs are forked; the server is started if it is not there, or no longer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cluster.run.imported"])
    before = dict(os.environ)
    os.environ.update(_OF_SERVER)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _train(log: str, arguments: list[str], environment: dict[str, str]) -> None:
    # In a session of its own: Ctrl-C reaches the sweep alone, which then stops its runs once.
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = arguments
    from cluster.cli import main

    main()


def _alive(pid: int | None) -> bool:
    try:
        return pid is not None and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
