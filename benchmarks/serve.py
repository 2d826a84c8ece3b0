"""A server under load: 32 clients for a minute, beside the bare policy, and with an expert that is killed.

    python -m benchmarks.serve runs/quickstart
    python -m benchmarks.serve runs/quickstart --clients 64 --seconds 30 policy.engine=vllm

Every phase is closed-loop: a client asks again as soon as it has its answer.  The clients run on the same machine, and
share its cores with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import tables
from benchmarks.memory import MemoryWatch, end_tree
from cluster.run.environment import PROCESS_ENVIRONMENT

PHASES = {
    "bare": "the policy alone: the same server, without experts and prefix",
    "cold": "every prompt is new to the experts",
    "cached": "the experts have seen every prompt before",
    "killed": "an expert's process is killed after a third of the time",
}
KNOWN = 64  # prompts of the cached phase
START_S = 300.0


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder or a bundle")
    parser.add_argument("overrides", nargs="*", help="key=value of its configuration, such as policy.engine=vllm")
    parser.add_argument("--phases", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each phase")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--server", nargs=2, metavar=("PORT", "BARE"), help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(line)


def serve(given: argparse.Namespace) -> None:
    """A server in this process, until it is told to end; a bare one has a router of kind `none`."""
    from dataclasses import replace

    from cluster.run.actors import join_cluster, leave_cluster
    from cluster.serve.opening import ready
    from cluster.serve.serving import APPLICATION, Options, start
    from experts.state import RouterSnapshot

    opened = ready(given.run, overrides=given.overrides)
    if given.server[1] == "bare":
        router = opened.config.router.model_copy(update={"kind": "none", "gate": False})
        nothing = replace(opened.trained, snapshot=RouterSnapshot.of({}, 0, 0))
        opened = replace(opened, trained=nothing, config=opened.config.model_copy(update={"router": router}))
    ended = threading.Event()
    join_cluster(None, None, APPLICATION)
    signal.signal(signal.SIGTERM, lambda *_: ended.set())  # after Ray, which sets its own
    try:
        start(opened, Options(port=int(given.server[0]), name="served"), None, ended)
        print("ready", flush=True)
        ended.wait()
    finally:
        leave_cluster()


@contextlib.contextmanager
def server(given: argparse.Namespace, bare: bool) -> Iterator[tuple[str, subprocess.Popen[str], MemoryWatch]]:
    """A server as a process of its own: its address, the process, and its memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind = "bare" if bare else "whole"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", __spec__.name, given.run, *given.overrides, "--server", str(port), kind],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | PROCESS_ENVIRONMENT,
    )
    watch = MemoryWatch(process.pid)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "ready":
                break
        else:
            raise SystemExit(f"the {kind} server ended with status {process.wait()} before it was ready")
        yield f"http://127.0.0.1:{port}", process, watch
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        end_tree(process.pid)


def prompts(given: argparse.Namespace) -> list[str]:
    """Real prompts of the run's tasks."""
    from cluster.serve.opening import ready
    from rewards.sources import build_tasks

    opened = ready(given.run, overrides=given.overrides)
    return [prompt.text for task in build_tasks(opened.config.data).values() for prompt in task.train[:2000]]


async def load(url: str, texts: Iterator[str], clients: int, seconds: float) -> dict[str, Any]:
    """Requests by so many clients; a phase ends when its time is over and every answer has come."""
    import aiohttp

    ends = time.perf_counter() + seconds
    latencies: list[float] = []
    outcomes: Counter[str] = Counter()
    tokens = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        while time.perf_counter() < ends:
            body = {"model": "served", "temperature": 0, "messages": [{"role": "user", "content": next(texts)}]}
            began = time.perf_counter()
            try:
                async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                    said = await answer.json()
                    if answer.status != 200:
                        outcomes[f"{answer.status}: {said['error']['message'][:80]}"] += 1
                        continue
            except (aiohttp.ClientError, TimeoutError) as error:
                outcomes[f"{type(error).__name__}: {str(error)[:80]}"] += 1
                continue
            latencies.append(time.perf_counter() - began)
            tokens += said["usage"]["completion_tokens"]
            outcomes["masked" if said["musketeers"]["masked"] else "ok"] += 1

    began = time.perf_counter()
    limit = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    spent = time.perf_counter() - began
    answered = outcomes["ok"] + outcomes["masked"]
    return {
        "requests": answered,
        "masked": outcomes["masked"],
        "failed": {reason: count for reason, count in outcomes.items() if reason not in ("ok", "masked")},
        "requests_per_second": answered / spent,
        "tokens_per_second": tokens / spent,
        "latency_s": {f"p{q}": float(np.percentile(latencies, q)) for q in (50, 90, 99)} if latencies else {},
        "seconds": spent,
    }


def measure(given: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every phase, on a fresh server each for the policy alone and for the whole."""
    texts = prompts(given)
    fresh = (f"{text} #{number}" for number, text in enumerate(itertools.cycle(texts)))
    found: dict[str, Any] = {}
    for bare in (True, False):
        phases = [phase for phase in given.phases if (phase == "bare") == bare]
        if not phases:
            continue
        with console.status(f"starting the {'bare' if bare else 'whole'} server"):
            place = server(given, bare)
            url, process, memory = place.__enter__()
        with contextlib.ExitStack() as stack:
            stack.push(place.__exit__)
            asyncio.run(load(url, fresh, given.clients, 5.0))  # the first answers pay for what is loaded lazily
            for phase in phases:
                again = itertools.cycle(texts[:KNOWN])
                if phase == "cached":
                    asyncio.run(load(url, again, given.clients, 5.0))
                with console.status(f"{phase}: {given.clients} clients for {given.seconds:g} s"):
                    killer = _killer(process, given.seconds / 3) if phase == "killed" else None
                    found[phase] = asyncio.run(
                        load(url, again if phase == "cached" else fresh, given.clients, given.seconds)
                    )
                    if killer is not None:
                        killer.join()
                console.print(_line(phase, found[phase]), highlight=False)
            found.setdefault("memory_mib", {})["bare" if bare else "whole"] = memory.stop()["total"]
    return found


def _killer(process: subprocess.Popen[str], after_s: float) -> threading.Thread:
    """Ends one expert's process after a while."""

    def kill() -> None:
        time.sleep(after_s)
        children = psutil.Process(process.pid).children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):  # it has just ended
                if any("expert-" in part for part in child.cmdline()):
                    child.kill()
                    return

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def _line(phase: str, found: dict[str, Any]) -> str:
    failed = sum(found["failed"].values())
    return f"{phase}: {found['requests']} answers, {found['masked']} without an expert, {failed} failed"


def render(found: dict[str, Any]) -> Table:
    """Beside the bare policy."""
    table = Table("phase", "requests/s", "of bare", "p50", "p90", "p99", "masked", "failed")
    table.caption = "\n".join(f"{phase}: {what}" for phase, what in PHASES.items() if phase in found)
    bare = found.get("bare", {}).get("requests_per_second")
    for phase in PHASES:
        if (mine := found.get(phase)) is None:
            continue
        latency = [f"{mine['latency_s'][q] * 1000:.0f} ms" if mine["latency_s"] else "–" for q in ("p50", "p90", "p99")]
        share = f"{mine['requests_per_second'] / bare:.2f}" if bare else "–"
        rate, failed = f"{mine['requests_per_second']:.1f}", str(sum(mine["failed"].values()))
        table.add_row(phase, rate, share, *latency, str(mine["masked"]), failed)
    return table


def main(line: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes the results; exit status 1 when a request has failed."""
    given, console = arguments(line), Console()
    if given.server:
        serve(given)
        return 0
    from cluster.run.records import versions

    machine, began = tables.device(), datetime.datetime.now(datetime.UTC)
    try:
        found = measure(given, console)
    except ValueError as error:
        console.print(f"error: {error}", highlight=False, markup=False)
        return 2
    console.print(render(found))
    results = {
        "date": began.date().isoformat(),
        "device": machine,
        "versions": versions(),
        "settings": {
            "run": Path(given.run).name,
            **{key: getattr(given, key) for key in ("overrides", "clients", "seconds")},
        },
        "load_before": os.getloadavg()[0],
        **found,
    }
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / tables.file_name(results["date"], machine, "serve")
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"results: {path}", highlight=False, soft_wrap=True)
    return 1 if any(found[phase]["failed"] for phase in PHASES if phase in found) else 0


if __name__ == "__main__":
    sys.exit(main())
