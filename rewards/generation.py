"""Entries of Reasoning Gym's data sets, made in a process whose hash seed is fixed.

Python draws another hash seed for every process, and with it the order of sets, which some data sets go through; others
leave settings behind that change what the next one makes.  Here every task's entries are made in a fork of a process
that has done nothing yet, so that they are a function of the task's settings and the seed alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

from rewards.child import die_with_parent
from rewards.config import DataConfig, TaskConfig
from rewards.prompts import prompt_of
from rewards.verify import RewardsError
from rollout.types import Prompt

if TYPE_CHECKING:
    from rewards.gym import Generated


END_S = 10.0  # from the end of its messages to that of the process, which then tells its exit code


class Generator:
    """Makes entries in a process of its own, which is started when there is something to make."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def generate(self, task: TaskConfig, seed: int) -> list[Generated]:
        """See `rewards.gym.generate`.

        Raises:
            RewardsError: as there, and when the process ends instead.
        """
        process = self._process or self._start()
        try:
            self._connection.send((task, seed))
            import rewards.gym  # noqa: F401 - two seconds, and the process needs them for the same

            # Unpickled, for it comes from our own process, and nothing that a model says is in it.
            answer: list[Generated] | RewardsError = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            self.close()
            raise RewardsError(
                f"task {task.name!r}: the process that generates {task.dataset} ended with exit code "
                f"{process.returncode}: is there too little memory for {task.size} entries? make size smaller"
            ) from error
        if isinstance(answer, RewardsError):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._connection.close()
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._connection, theirs = Pipe()
        paths = [os.path.abspath(path) for path in sys.path]
        call = f"import sys; sys.path[:] = {paths!r}; from rewards.generation import main"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{call}; main({theirs.fileno()}, {os.getpid()})"],
            env=os.environ | {"PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is for results
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for us alone: we end it
        )
        theirs.close()
        return self._process


_shared: ContextVar[Generator | None] = ContextVar("_shared", default=None)


@contextmanager
def one_generator() -> Iterator[Generator]:
    """One process for all that is generated within the block; a block within another shares its process."""
    if (outer := _shared.get()) is not None:
        yield outer
        return
    generator = Generator()
    token = _shared.set(generator)
    try:
        yield generator
    finally:
        _shared.reset(token)
        generator.close()


def gym_entries(task: TaskConfig, data: DataConfig) -> list[Prompt]:
    """`task.size` entries of the data set, generated from `data.seed`, repeats included.

    Raises:
        RewardsError: unknown data set or setting, or settings that the data set refuses.
    """
    with one_generator() as generator:
        generated = generator.generate(task, data.seed)
    return [
        prompt_of(
            task,
            data,
            question=entry["question"],
            answer=_gold(entry),
            payload={"entry": entry} if level is None else {"entry": entry, "level": level},
        )
        for entry, level in generated
    ]


def _gold(entry: dict[str, Any]) -> str:
    """The gold answer; empty where many answers are right and only the data set can tell."""
    return "" if entry["answer"] is None else str(entry["answer"])


def main(descriptor: int, parent: int) -> None:
    """The process: answers every (task, seed) that comes in with its entries, or with the reason why not.

    descriptor: of its end of the connection.  parent: process id of whoever started it, with whom it ends.
    """
    die_with_parent(parent)
    from rewards import gym

    me = os.getpid()
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionError):  # nobody is there any more
        while True:
            task, seed = connection.recv()
            if (pid := os.fork()) == 0:
                die_with_parent(me)
                try:
                    connection.send(gym.generate(task, seed))
                except RewardsError as error:
                    connection.send(error)
                os._exit(0)
            if status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                sys.exit(abs(status))
