"""Entries of Reasoning Gym's data sets, made in a process whose hash seed is fixed.

Python draws another hash seed for every process, and with it the order of sets, which some data sets go through.  With
a fixed one, entries are a function of the configuration alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

from rewards.config import DataConfig, TaskConfig
from rewards.prompts import prompt_of
from rewards.verify import RewardsError
from rollout.types import Prompt

if TYPE_CHECKING:
    from rewards.gym import Generated

HASH_SEED = "0"  # which is also how Python spells: no randomization


class Generator:
    """Makes entries in a process of its own, which is started when there is something to make.

    A process that has the fixed hash seed itself does without another.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def generate(self, task: TaskConfig, seed: int) -> list[Generated]:
        """See `rewards.gym.generate`.

        Raises:
            RewardsError: as there, and when the process ends instead.
        """
        if not sys.flags.hash_randomization:
            from rewards.gym import generate

            return generate(task, seed)
        process = self._process or self._start()
        try:
            self._connection.send((task, seed))
            import rewards.gym  # noqa: F401 - two seconds, and the process needs them for the same
            # Nothing that a model says is in it: it is our own process's.
            answer: list[Generated] | RewardsError = self._connection.recv()
        except (EOFError, ConnectionError) as error:
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
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._connection, theirs = Pipe()
        paths = [os.path.abspath(path) for path in sys.path]
        call = f"import sys; sys.path[:] = {paths!r}; from rewards.generation import main; main({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", call],
            env=os.environ | {"PYTHONHASHSEED": HASH_SEED},
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


def main(descriptor: int) -> None:
    """The process: answers every (task, seed) that comes in with its entries, or with the reason why not."""
    from rewards.gym import generate

    with Connection(descriptor) as connection:
        while True:
            try:
                task, seed = connection.recv()
                try:
                    answer: list[Generated] | RewardsError = generate(task, seed)
                except RewardsError as error:
                    answer = error
                connection.send(answer)
            except (EOFError, ConnectionError):  # nobody is there any more
                return
