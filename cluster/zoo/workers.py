"""The processes that train a world's models, as their parent sees them."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.zoo.progress import Progress
from cluster.zoo.recipe import ZooError


class Workers:
    """Up to `count` worker processes with one torch thread each; a context manager that ends them all.

    folder: holds `recipe.json`; the models are saved in it.
    """

    def __init__(self, folder: Path, count: int, progress: Progress) -> None:
        self.folder, self.count, self.progress = folder, count, progress
        self._all: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._all:
            worker.end()

    def run(self, jobs: list[str]) -> dict[str, dict[str, Any]]:
        """Every job's result; jobs begin in their order, each as soon as a worker is free.

        Raises:
            ZooError: when a worker fails; the message is the last line it wrote.
        """
        waiting = list(reversed(jobs))
        results: dict[str, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for worker in self._free(len(jobs)):
                worker.give(waiting.pop())
                selector.register(worker.output, selectors.EVENT_READ, worker)
            while len(results) < len(jobs):
                for key, _ in selector.select():
                    worker = key.data
                    job, result = worker.job, worker.read(self.progress)
                    if result is not None:
                        results[job] = result
                        self.progress.done(job)
                        if waiting:
                            worker.give(waiting.pop())
        return results

    def _free(self, wanted: int) -> list[_Worker]:
        while len(self._all) < min(self.count, wanted):
            self._all.append(_Worker(self.folder, self.folder / f"worker-{len(self._all)}.log"))
        return self._all[:wanted]


class _Worker:
    def __init__(self, folder: Path, log: Path) -> None:
        self.log = log
        self.job = ""
        self._unread = b""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.zoo.worker", str(folder), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its workers
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout

    def give(self, job: str) -> None:
        """Hands the worker its next job; one that has died is noticed when its output is read."""
        self.job = job
        with suppress(BrokenPipeError):
            self._input.write(f"{job}\n".encode())
            self._input.flush()

    def read(self, progress: Progress) -> dict[str, Any] | None:
        """Takes what the worker has written: the job's result, once that has come."""
        data = os.read(self.output.fileno(), 65536)
        if not data:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
            raise ZooError(f"zoo worker for {self.job!r} failed (exit code {self._process.wait()}): {lines[-1]}")
        *lines_read, self._unread = (self._unread + data).split(b"\n")
        result = None
        for line in lines_read:
            message = json.loads(line)
            if "result" in message:
                result = message["result"]
            else:
                progress.step(self.job, message["step"], message["loss"])
        return result

    def end(self) -> None:
        """Ends the process whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self.output):
            with suppress(BrokenPipeError):
                pipe.close()
