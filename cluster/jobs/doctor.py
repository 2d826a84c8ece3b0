"""`musketeers doctor`: what this machine offers, and what it lacks for a run.

Every check answers with a `Check`, whatever goes wrong inside it: a machine in a bad state is what
the doctor is called for.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config import RunConfig
from cluster.jobs import cluster_checks
from cluster.jobs.findings import GIB, Check
from cluster.jobs.self_checks import self_checks
from experts import vllm_install
from learner.compiled import OP, op_folder, stale_lock
from rewards.jail import kernel

DISTRIBUTION = "n-musketeers"
PREBUILD = "run .venv/bin/python scripts/prebuild_deepspeed.py"
PORTS = {6379: "Ray", 8265: "its dashboard"}
# A worker that has imported torch and transformers holds about half a GiB; the smallest run has a handful.
MIN_MEMORY_GIB = 4.0
MIN_DISK_GIB = 5.0
CONNECT_TIMEOUT_S = 3.0


def examine(config: RunConfig | None, runs: Path, zoo: Path, address: str | None, console: Console) -> int:
    """Checks this machine, then the cluster if there is one, and what a configuration needs of either.

    Prints the findings and returns the exit status: 0 when all is fine, else 1.
    """
    address = address or (config.ray.address if config else None) or os.environ.get("RAY_ADDRESS")
    memory = max(MIN_MEMORY_GIB, cluster_checks.memory_gib(config) if config and not address else 0.0)
    found = checks(runs=config.folder.parent if config else runs, zoo=zoo, address=address, memory_gib=memory)
    table = None
    if config:
        found += _guarded("models", lambda: cluster_checks.config_checks(config))
        if not address:
            found += _guarded("resources", lambda: cluster_checks.local_resources(config))
            if all(check.ok for check in found) and all(map(cluster_checks.is_built, config.models().values())):
                with console.status("loading the models, to check them"):
                    found += _guarded("self-check", lambda: self_checks(config))
    if address and all(check.ok for check in found if check.name == "Ray"):
        with console.status("looking at the cluster from inside"):
            inside = cluster_checks.look_inside(address, config)
        found += _guarded("Ray cluster", lambda: cluster_checks.cluster_checks(inside, config))
        if "nodes" in inside:
            table = cluster_checks.nodes_table(inside, config)
    status = report(found, console)
    if table is not None:
        console.print(table)
    return status


def checks(
    *,
    runs: Path,
    zoo: Path,
    address: str | None = None,
    distribution: str = DISTRIBUTION,
    memory_gib: float | None = None,
) -> list[Check]:
    """All checks of this machine, in the order in which they are best mended.

    runs: the folder that will hold the runs' folders.
    zoo: root of the cache of built models.
    memory_gib: that must be available; by default what the smallest run wants.
    address: of the Ray cluster, as Ray understands it; None takes RAY_ADDRESS, and without either the
        check is left out.
    distribution: whose requirements are checked.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    found = [*_guarded("packages", lambda: list(_packages(distribution)))]
    for name, check in (
        ("compiler", _compiler),
        ("DeepSpeed op", _deepspeed_op),
        ("vLLM", _vllm),
        ("GPUs", _gpus),
        ("jail of verifiers", _jail),
        ("memory", lambda: _memory(memory_gib or MIN_MEMORY_GIB)),
        ("disk", lambda: _disk(runs)),
        ("runs folder", lambda: _writable("runs folder", runs)),
        ("zoo cache", lambda: _writable("zoo cache", zoo)),
        ("ports", _ports),
    ):
        found += _guarded(name, check)
    if address:
        found += _guarded("Ray", lambda: _ray(address))
    return found


def report(found: list[Check], console: Console) -> int:
    """Prints the checks as a table and returns the exit status: 0 when all are fine, else 1."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in found:
        mark = Text("ok", style="green") if check.ok else Text("FAIL", style="bold red")
        table.add_row(Text(check.name), mark, Text(check.detail), Text("" if check.ok else check.remedy))
    console.print(table)
    failed = sum(not check.ok for check in found)
    console.print(f"\n{failed} of {len(found)} checks failed" if failed else f"\nall {len(found)} checks passed")
    return 1 if failed else 0


def _guarded(name: str, check: Callable[[], Check | list[Check]]) -> list[Check]:
    """The check's findings; an exception of any kind becomes a failed check."""
    try:
        found = check()
    except Exception as error:  # noqa: BLE001 - a broken package may raise anything when imported
        return [Check(name, False, f"{type(error).__name__}: {error}", "make install")]
    return found if isinstance(found, list) else [found]


def _packages(distribution: str) -> Iterator[Check]:
    """Python's and every required package's version against the ranges that `distribution` declares."""
    try:
        metadata = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        yield Check(distribution, False, "not installed", "make install")
        return
    python, range_ = platform.python_version(), metadata["Requires-Python"]
    yield Check(
        "Python", SpecifierSet(range_).contains(python), f"{python} ({range_})", "make install PYTHON=a supported one"
    )
    for line in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Check:
    wanted = str(requirement.specifier) or "any version"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(requirement.name, False, f"not installed ({wanted})", "make install")
    ok = requirement.specifier.contains(version, prereleases=True)
    return Check(requirement.name, ok, f"{version} ({wanted})", f'pip install "{requirement}"')


def _compiler() -> Check:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return Check("compiler", False, "no C++ compiler", "apt-get install g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return Check("compiler", False, f"{header} is missing", "apt-get install python3-dev")
    return Check("compiler", True, compiler)


def _deepspeed_op() -> Check:
    """Without a GPU, DeepSpeed compiles a small op at the first training, unless it is there already."""
    name = "DeepSpeed op"
    import torch

    if torch.cuda.is_available():
        return Check(name, True, "not needed: this machine has a GPU")
    folder = op_folder()
    if lock := stale_lock(folder):
        return Check(name, False, f"a killed build left {lock}, which blocks every later one", PREBUILD)
    # DeepSpeed asks for ninja at every start; pip puts it beside the interpreter, which need not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if shutil.which("ninja", path=path) is None:
        return Check(name, False, "ninja is missing", "make install")
    if _is_prebuilt(folder):
        return Check(name, True, f"prebuilt in {folder}")
    if not _compiler().ok:
        return Check(name, False, "not built, and no compiler to build it", "apt-get install g++ python3-dev")
    return Check(name, True, "not built: the first training compiles it, in about a minute")


def _is_prebuilt(folder: Path) -> bool:
    """Whether `folder` holds the op built from THIS environment's DeepSpeed: torch builds another's anew."""
    recipe = folder / "build.ninja"
    spec = importlib.util.find_spec("deepspeed")
    if not (folder / f"{OP}.so").exists() or not recipe.exists() or spec is None:
        return False
    return any(f" {source}/" in recipe.read_text() for source in spec.submodule_search_locations or [])


def _vllm() -> Check:
    found = vllm_install.version()
    if found is None:
        return Check("vLLM", True, "not installed: engine: vllm needs it (make install-vllm)")
    wanted = vllm_install.SUPPORTED
    ok = wanted.contains(found.partition("+")[0], prereleases=True)
    return Check("vLLM", ok, f"{found} ({wanted})", "make install-vllm")


def _gpus() -> Check:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Check(
            "GPUs", True, ", ".join(f"{device.name} {device.total_memory / GIB:.0f} GiB" for device in devices)
        )
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return Check("GPUs", True, f"not used: torch {torch.__version__} is a build without CUDA")
    return Check("GPUs", True, "none: everything runs on the CPU")


def _jail() -> Check:
    """What confines verifiers; a run asks for more than limits only with rewards.jail: require."""
    found = kernel()
    there = [f"Landlock {found.landlock}"] * bool(found.landlock) + ["seccomp"] * found.seccomp
    without = f"; no {' and no '.join(found.missing)}: rewards.jail: require would refuse" if found.missing else ""
    return Check("jail of verifiers", True, (", ".join(there) or "limits alone") + without)


def _memory(wanted: float) -> Check:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} GiB available of {memory.total / GIB:.1f}, {os.cpu_count()} CPUs"
    remedy = f"end other programs, or take fewer workers: a run wants {wanted:.1f} GiB"
    return Check("memory", memory.available >= wanted * GIB, detail, remedy)


def _ports() -> Check:
    """Ray's own ports here; a run that starts its own cluster takes others where these are taken."""
    taken = []
    for port, what in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    return Check(
                        "ports", False, f"{port} ({what}): {error.strerror}", "let programs listen on loopback"
                    )
                taken.append(f"{port} ({what})")
    detail = f"taken: {', '.join(taken)}; a run takes others" if taken else "Ray's own are free"
    return Check("ports", True, detail)


def _disk(folder: Path) -> Check:
    existing = _existing(folder)
    free = shutil.disk_usage(existing).free / GIB
    remedy = f"free some space: a run wants {MIN_DISK_GIB:.0f} GiB"
    return Check("disk", free >= MIN_DISK_GIB, f"{free:.1f} GiB free at {existing}", remedy)


def _writable(name: str, folder: Path) -> Check:
    """Whether `folder` can be written, or made where it does not exist yet.  Leaves nothing behind."""
    existing = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(name, False, f"{folder}: {error.strerror} at {existing}", "choose another folder, or its rights")
    return Check(name, True, str(folder))


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest of its parents that exists."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _ray(address: str) -> Check:
    remedy = "start Ray there (ray start --head), or mend the address"
    try:
        host, port = _endpoint(address)
        socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return Check("Ray", False, f"{address}: {error}", remedy)
    return Check("Ray", True, f"{address} answers")


def _endpoint(address: str) -> tuple[str, int]:
    """Host and port behind `auto`, `host:port`, `ray://host:port` or the job server's `http://host:port`.

    Raises:
        ValueError: when the address names no port, or is `auto` where no Ray runs.
    """
    if address == "auto":
        current = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
        if not current.exists():
            raise ValueError("no Ray runs on this machine")
        address = current.read_text().strip()
    parts = urlsplit(address if "://" in address else f"//{address}")
    port = parts.port or {"ray": 10001, "http": 80, "https": 443}.get(parts.scheme)
    if parts.hostname is None or port is None:
        raise ValueError("expected host:port, ray://host:port, http://host:port or auto")
    return parts.hostname, port
