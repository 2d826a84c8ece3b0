"""Memory of a process and everything it started."""

from __future__ import annotations

import threading
from collections import defaultdict

import psutil

MIB = 2**20


class MemoryWatch:
    """Samples a process tree in a thread of its own until `stop`.

    The measure is the proportional set size: memory that processes share (libraries, Ray's object
    store) counts once.  Where the system has none, the resident set size stands in.
    """

    def __init__(self, pid: int, every_s: float = 2.0) -> None:
        self.total = 0
        self.by_process: dict[int, int] = defaultdict(int)
        self.names: dict[int, str] = {}
        self._root, self._every_s = psutil.Process(pid), every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """Ends the sampling; peaks in MiB: `total` of any one moment, and of every kind of process by name.

        Processes of one name are added up (each at its own peak).
        """
        self._stopped.set()
        self._thread.join()
        peaks: dict[str, float] = defaultdict(float)
        for pid, peak in self.by_process.items():
            peaks[self.names[pid]] += peak / MIB
        return {"total": self.total / MIB, **dict(sorted(peaks.items(), key=lambda item: -item[1]))}

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for process in tree(self._root):
            try:
                used = _used(process)
                self._name(process)
            except psutil.Error:  # it has just ended, or is not ours to look into
                continue
            total += used
            self.by_process[process.pid] = max(self.by_process[process.pid], used)
        self.total = max(self.total, total)

    def _name(self, process: psutil.Process) -> None:
        """A Ray worker is named after its class once it has one: keep the last name but `IDLE`."""
        name = label(process.cmdline(), process.name())
        if name != "ray::IDLE" or process.pid not in self.names:
            self.names[process.pid] = name


def tree(root: psutil.Process) -> list[psutil.Process]:
    """The process and all that descend from it."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def label(command: list[str], name: str) -> str:
    """A short name for a process: a Ray worker's class, our own parts by role, Ray's services together."""
    line = " ".join(command)
    if line.startswith("ray::"):
        worker = line.split()[0].partition(".")[0]
        return "Ray services" if worker.endswith("Agent") else worker
    if "rewards.zygote" in line:
        return "scoring process"
    if "benchmarks." in line:
        return "driver"
    if "ray/" in line or "gcs_server" in line or "raylet" in line:
        return "Ray services"
    return name


def _used(process: psutil.Process) -> int:
    memory = process.memory_full_info()
    return int(getattr(memory, "pss", 0) or memory.rss)


def end_tree(pid: int) -> None:
    """Kills a process and all that descend from it."""
    for process in tree(psutil.Process(pid)) if psutil.pid_exists(pid) else []:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
