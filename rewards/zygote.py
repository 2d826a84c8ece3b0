"""The process that forks scoring processes: it has loaded the verifiers, so that a new one is ready in milliseconds.

No completion ever reaches it.  It adopts what its scoring processes leave behind, and ends it; it ends itself, with all
of them, when its owner goes away.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from rewards import child
from rewards.child import Limits
from rewards.verify import Preparable, RewardsError, Verifier

START_S = 180.0  # a cold import of a large verifier library on a loaded machine stays well below this
ANSWER_S = 60.0  # a fork takes milliseconds
READY = b"ready"
_FORK, _END = b"F", b"E"
_COMMAND, _ANSWER = struct.Struct("<ci"), struct.Struct("<i")
_PR_SET_CHILD_SUBREAPER = 36
_FIRST_DESCRIPTOR = 100  # the scoring process's own stand here and behind; all others are closed
# What verifiers may see of the owner's environment: no tokens, no addresses.
_ENVIRONMENT = (
    "PATH", "HOME", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH",
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE", "NLTK_DATA",
)  # fmt: skip
_SET = {
    "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}  # fmt: skip
# Beside Python itself and its packages: shared libraries, the time zone, entropy, the number of processors.
_SYSTEM = (
    "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero",
    "/sys/devices/system/cpu",
)  # fmt: skip


class Zygote:
    """Starts, and ends, scoring processes.  May be called from several threads."""

    def __init__(self, verifiers: Mapping[str, Verifier], limits: Limits) -> None:
        """verifiers: by task name, importable where a new Python with this one's `sys.path` starts.

        Raises:
            RewardsError: when they cannot be pickled, or loaded in the new process.
        """
        self.names = list(verifiers)
        try:
            self._payload = pickle.dumps(limits) + pickle.dumps(dict(verifiers))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RewardsError(f"the verifiers of {self.names} cannot be pickled: {error}") from error
        self._jailed = limits.jailed
        self._lock = threading.Lock()
        self._start()

    def fork(self, down: int, up: int, board: int) -> int:
        """A new scoring process with these descriptors (see `child.main`); its process id.

        Raises:
            RewardsError: when there is none to be had.
        """
        with self._lock:
            try:
                pid = self._ask(_FORK, 0, [down, up, board])
            except OSError:  # somebody has ended it
                self._end()
                self._start()
                pid = self._ask(_FORK, 0, [down, up, board])
        if pid < 0:
            raise RewardsError(f"no process can be started that scores {self.names}: {os.strerror(-pid)}")
        return pid

    def end(self, pid: int) -> int:
        """End a scoring process and whatever it has started; its exit code, negative for a signal's number."""
        with self._lock:
            try:
                return self._ask(_END, pid)
            except OSError:
                return -signal.SIGKILL  # it went with the zygote

    def close(self) -> None:
        """End it and all its scoring processes; may be called twice."""
        with self._lock:
            self._end()

    def _ask(self, command: bytes, pid: int, descriptors: Sequence[int] = ()) -> int:
        socket.send_fds(self._control, [_COMMAND.pack(command, pid)], list(descriptors))
        answer = self._control.recv(_ANSWER.size)
        if len(answer) != _ANSWER.size:
            raise ConnectionError("the process that starts scoring processes has gone")
        return int(_ANSWER.unpack(answer)[0])

    def _start(self) -> None:
        # Not multiprocessing: its `spawn` runs the caller's main module again, which under Ray is Ray's own worker.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        payload = os.memfd_create("verifiers")
        with open(payload, "wb", closefd=False) as file:
            file.write(self._payload)
        paths = [os.path.abspath(path) for path in sys.path]
        call = f"import sys; sys.path[:] = {paths!r}; from rewards.zygote import main"
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"{call}; main({theirs.fileno()}, {payload})"],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), payload],
            start_new_session=True,
            env=_jail_environment() if self._jailed else None,
        )
        theirs.close()
        os.close(payload)
        self._control.settimeout(START_S)
        try:
            answer = self._control.recv(4 * child.REASON_LENGTH)
        except TimeoutError:
            answer = f"it was silent for {START_S:g} s".encode()
        except ConnectionError:
            answer = b""
        if answer != READY:
            self._end()
            gone = f"it ended with exit code {self._process.returncode}"
            why = answer.decode(errors="replace") or gone
            raise RewardsError(f"the process that scores {self.names} did not start: {why}")
        self._control.settimeout(ANSWER_S)

    def _end(self) -> None:
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # while it loads, it looks at nothing
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _jail_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT or name.startswith("LC_")}
    return kept | _SET


def main(control_descriptor: int, payload: int) -> None:
    """Load the verifiers, then do as the owner says until it goes away."""
    control = socket.socket(fileno=control_descriptor)
    os.dup2(2, 1)  # what is printed while verifiers are loaded is no output of a command
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(START_S))  # an import that hangs would not notice that the owner has gone
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with open(payload, "rb") as file:
        file.seek(0)
        limits: Limits = pickle.load(file)
        try:
            verifiers: dict[str, Verifier] = pickle.load(file)
            for verifier in verifiers.values():
                if isinstance(verifier, Preparable):
                    verifier.prepare()
        except Exception as error:  # noqa: BLE001 - any import can fail in any way; the owner reports it
            control.send(child.reason_of(error).encode(errors="replace"))
            return
    signal.alarm(0)
    limits = replace(limits, readable=_readable())
    with _working_folder(limits.jailed):
        gc.collect()
        gc.freeze()  # what is loaded is not copied by the collector of every process that is forked
        control.send(READY)
        _serve(control, limits, verifiers)


@contextlib.contextmanager
def _working_folder(empty: bool) -> Iterator[None]:
    """An empty folder of its own, or where the owner is."""
    if not empty:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="scoring-") as folder:
        os.chdir(folder)
        yield


def _serve(control: socket.socket, limits: Limits, verifiers: Mapping[str, Verifier]) -> None:
    children: set[int] = set()
    while True:
        try:
            message, descriptors, _, _ = socket.recv_fds(control, _COMMAND.size, 3)
        except ConnectionError:
            message, descriptors = b"", []
        if not message:
            _end(set(children), children)
            return
        command, pid = _COMMAND.unpack(message)
        if command == _FORK:
            answer = _fork(descriptors, limits, verifiers)
            children |= {answer} if answer > 0 else set()
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            answer = _end({pid} & children, children)
        with contextlib.suppress(OSError):
            control.send(_ANSWER.pack(answer))


def _fork(descriptors: Sequence[int], limits: Limits, verifiers: Mapping[str, Verifier]) -> int:
    """The new process's id, or minus the number of the error."""
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        return -(error.errno or 1)
    if pid:
        return pid
    try:
        os.setsid()  # so that a kill takes along what a verifier has started
        child.die_with_parent(parent)
        down, up, board = _keep(descriptors, quiet=limits.jailed)
        child.main(down, up, board, limits, verifiers)
        os._exit(0)
    finally:
        os._exit(1)


def _keep(descriptors: Sequence[int], quiet: bool) -> list[int]:
    """The descriptors at their new places, everything else closed.

    quiet: nothing that is printed arrives anywhere; else it arrives where errors do.
    """
    kept = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR) for descriptor in descriptors]
    if quiet:
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
    os.closerange(3, _FIRST_DESCRIPTOR)
    os.closerange(max(kept) + 1, os.sysconf("SC_OPEN_MAX"))
    return kept


def _end(pids: set[int], children: set[int]) -> int:
    """End these scoring processes and all that was left to this one; the exit code of the last of them."""
    code = 0
    for pid in pids:
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        children.discard(pid)
    # What they had started is now this process's own, with nobody else to end it.
    while strays := _own_children() - children:
        for pid in strays:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return code


def _own_children() -> set[int]:
    me = os.getpid()
    try:
        return {int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()}
    except FileNotFoundError:  # a kernel without that list; to look at all processes takes longer
        return {process.pid for process in psutil.Process().children()}


def _readable() -> tuple[str, ...]:
    """Where the code is that this process runs, and that a verifier may still import."""
    ours = str(Path(__file__).resolve().parents[1])
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    code = {*map(os.path.dirname, filter(None, files)), *filter(None, sys.path), *sysconfig.get_paths().values(), ours}
    found: list[str] = []
    for path in sorted(map(os.path.realpath, {*_SYSTEM, sys.prefix, sys.base_prefix, *code}), key=len):
        if path != "/" and not any(path == kept or path.startswith(kept.rstrip("/") + "/") for kept in found):
            found.append(path)
    return tuple(found)
