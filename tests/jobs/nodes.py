"""A real Ray cluster of several nodes on this machine's loopback: one head and some workers, each a `ray start` of its
own with its own agents and ports, and GPUs that are not there."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_S = 180.0
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports of loopback that are free now, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def wait_for(what: str, condition: Callable[[], Any], limit_s: float = START_S, every_s: float = 0.5) -> Any:
    """The first true value of a condition; fails with `what` when there is none in time."""
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:g} s"
        time.sleep(every_s)
    return value


@dataclass
class Node:
    """One `ray start --block` with everything that it started."""

    process: subprocess.Popen[bytes]
    metrics_port: int
    log: Path

    def kill(self) -> None:
        """The whole machine goes dark: every process of the node, and those that its raylet started, at once."""
        mine = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in mine:
            process.send_signal(signal.SIGSTOP) if process.is_running() else None
        for process in mine:
            if process.is_running():
                process.kill()
        self.process.wait(30)

    def end(self) -> None:
        """An ordinary end."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass
class Cluster:
    """Nodes that share a token nobody else has."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Sockets lie in it, whose paths must be short.
        self.temporary = Path(tempfile.mkdtemp(prefix="rn", dir="/tmp"))
        self.token = self.folder / "auth_token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.port, self.dashboard, self.client = free_ports(3)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INDEX": "1",
        }

    @property
    def address(self) -> str:
        """Of the job server and dashboard."""
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def sessions(self) -> Path:
        """The head's folder of Ray sessions."""
        return self.temporary / "0"

    @property
    def gcs(self) -> str:
        """Of Ray itself."""
        return f"127.0.0.2:{self.port}"

    def head(self, *options: str) -> Node:
        """The head node."""
        return self._start(
            "--head", f"--port={self.port}", f"--ray-client-server-port={self.client}",
            "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}", *options,
        )  # fmt: skip

    def worker(self, *options: str) -> Node:
        """One more node."""
        return self._start(f"--address={self.gcs}", *options)

    def _start(self, *options: str) -> Node:
        listen, grpc, environment, metrics = free_ports(4)
        # Each node has an address of loopback to itself; 127.0.0.1 would not do, Ray takes it for the machine's own.
        host = f"127.0.0.{2 + len(self.nodes)}"
        # And a folder to itself, as a machine has: agents that share one install a job's wheel over each other.
        own = self.temporary / str(len(self.nodes))
        log = self.folder / f"node-{len(self.nodes)}.log"
        command = [
            str(BIN / "ray"), "start", *options, "--block", "--disable-usage-stats",
            f"--node-ip-address={host}", f"--temp-dir={own}",
            f"--dashboard-agent-listen-port={listen}", f"--dashboard-agent-grpc-port={grpc}",
            f"--runtime-env-agent-port={environment}", f"--metrics-export-port={metrics}",
            "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={150 * 2**20}",
        ]  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        node = Node(process, metrics, log)
        self.nodes.append(node)
        return node

    def musketeers(self, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
        """The project's command as a client of this cluster; `more` goes into its environment."""
        run = subprocess.run(
            [str(BIN / "musketeers"), *arguments],
            capture_output=True, text=True, env={**self.environment, "COLUMNS": "200", **more}, cwd=self.folder,
            timeout=600,
        )  # fmt: skip
        assert not check or run.returncode == 0, run.stdout + run.stderr
        return run

    def grown(self, count: int, *options: str) -> None:
        """That many workers, one after the other: a raylet gives up when it needs more than half a minute to start."""
        for _ in range(count):
            self.worker(*options)
            self.alive(len(self.nodes))

    def alive(self, count: int) -> None:
        """Waits until so many nodes are in the cluster."""
        script = "import ray, sys; ray.init(logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"

        def there() -> bool:
            said = subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True,
                env={**self.environment, "RAY_ADDRESS": self.gcs},
            )  # fmt: skip
            return said.stdout.strip() == str(count)

        wait_for(f"{count} nodes", there)

    def close(self) -> None:
        """Ends every process that this cluster started."""
        for node in reversed(self.nodes):
            node.end()
        shutil.rmtree(self.temporary, ignore_errors=True)
