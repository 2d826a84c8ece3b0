"""Tries to break out of the scoring process, with a verifier that executes what it is told.

    python -m tests.rewards.breaches FOLDER [--jail off] [--only ATTACK ...]

Prints what was breached as a JSON list: an empty one is as it should be.  FOLDER: an empty one outside of all code.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rewards.config import RewardsConfig
from rewards.verify import ExactInteger
from rewards.worker import RewardWorker
from rollout.types import Prompt, RewardStatus, Score
from tests.rewards.verifiers import a_prompt

LIMIT_S = 0.5
SECRET = "hf_" + "s3cret" * 4
FORGED = '{"index": 99, "reward": 1.0}'
SURVIVOR = "86399"  # of `sleep`

# Inside code, for all of it: what a completion can find out about the process that scores it.
FINDERS = """
import ctypes, gc, mmap, os, pickle, resource, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def descriptors(kind):
    found = []
    for fd in range(3, 1024):
        try: mode = os.fstat(fd).st_mode
        except OSError: continue
        if kind == "all" or (mode & 0o170000 == 0o140000): found.append(fd)
    return found
def board():
    return next(o for o in gc.get_objects() if type(o).__name__ == "Board")
"""

# What must not work in the jail: the code sets `score` to 1 where it did, unless the harm shows by itself.
JAILED = {
    "writes a file": "open('{outside}/written', 'w').write('x')",
    "writes beside the code": "open(os.path.join(os.path.dirname(sys.modules['rewards'].__file__), 'pwn'), 'w')",
    "removes a file": "os.unlink('{outside}/secret')",
    "renames a file": "os.rename('{outside}/secret', '{outside}/moved')",
    "truncates a file": "os.truncate('{outside}/secret', 0)",
    "changes a mode": "os.chmod('{outside}/secret', 0o777); score = 1",
    "makes a folder": "os.mkdir('{outside}/folder')",
    "makes a link": "os.symlink('/etc', '{outside}/link')",
    "writes to shared memory": "open('/dev/shm/musketeers-breach-{owner}', 'w'); score = 1",
    "reads a file": "score = float('{secret}' in open('{outside}/secret').read())",
    "lists a folder": "score = float('secret' in os.listdir('{outside}'))",
    "reads its environment": "score = float('{secret}' in str(os.environ))",
    "reads the owner's environment": "score = float('{secret}' in open('/proc/{owner}/environ').read())",
    "reads all environments": (
        "for pid in os.listdir('/proc'):\n"
        "    try: score = max(score, float('{secret}' in open(f'/proc/{{pid}}/environ').read()))\n"
        "    except OSError: pass"
    ),
    "reads the owner's memory": (
        "buffer = ctypes.create_string_buffer(16)\n"
        "own = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 16)\n"
        "score = float(libc.syscall(310, {owner}, own, 1, own, 1, 0) > 0)"
    ),
    "finds files in its folder": "os.listdir('.') and None; score = float(len(os.listdir('.')) > 0)",
    "has other descriptors": "score = float(len(descriptors('all')) > 3)",
    "forks": "score = float(os.fork() >= 0)",
    "spawns": "os.posix_spawn('/bin/sleep', ['sleep', '{survivor}'], {{}}); score = 1",
    "runs a program": "subprocess.run(['touch', '{outside}/ran'], check=True)",
    "becomes a program": "os.execv('/usr/bin/touch', ['touch', '{outside}/became'])",
    "runs a shell": "os.system('touch {outside}/shell')",
    "forks without end": "while True: os.fork()",
    "connects": "socket.create_connection(('127.0.0.1', {port}), 1)",
    "opens a socket": "socket.socket(); score = 1",
    "listens": "socket.socket().bind(('127.0.0.1', 0)); score = 1",
    "opens a pair of sockets": "socket.socketpair(); score = 1",
    "kills another": "os.kill({victim}, 9)",
    "kills a thread of another": "score = float(libc.syscall(234, {victim}, {victim}, 9) == 0)",
    "kills everybody": "os.kill(-1, 9); score = 1",
    "stops another": "os.kill({victim}, signal.SIGSTOP)",
    "traces another": "score = float(libc.ptrace(16, {victim}, 0, 0) == 0)",
    "traces itself": "score = float(libc.ptrace(0, 0, 0, 0) == 0)",
    "raises a limit": "resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)); score = 1",
    "raises another's limit": "resource.prlimit({victim}, resource.RLIMIT_NOFILE, (9, 9)); score = 1",
    "may write files": "score = float(resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0)",
    "opens many files": "fds = [os.open('/dev/null', 0) for _ in range(2000)]; score = 1",
    "mounts": "score = float(libc.mount(b'none', b'{outside}', b'tmpfs', 0, None) == 0)",
    "leaves its namespace": "score = float(libc.unshare(0x10000000) == 0)",
    "makes a file in memory": "os.memfd_create('x'); score = 1",
    "prints": "print('{forged}', flush=True); print('{forged}', file=sys.stderr, flush=True); os.write(1, b'{forged}')",
}  # fmt: skip

# What must not work without a jail either.
ANYWHERE = {
    "eats memory": "kept = mmap.mmap(-1, 2**29, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); score = 1",
    "eats shared memory": "kept = mmap.mmap(-1, 2**32); score = 1",
    "may dump its memory": "score = float(resource.getrlimit(resource.RLIMIT_CORE)[0] != 0)",
    "shrinks the board": (
        "for fd in descriptors('all'):\n    try: os.ftruncate(fd, 0)\n    except OSError: pass\nos.kill(os.getpid(), 9)"
    ),
    "sends a pickle": (
        "class Evil:\n    def __reduce__(self): return os.system, ('touch {outside}/unpickled',)\n"
        "for fd in descriptors('sockets'):\n"
        "    for data in (pickle.dumps(Evil()), struct.pack('!i', 80) + pickle.dumps(Evil())): os.write(fd, data)"
    ),
    "sends noise": "for fd in descriptors('sockets'): os.write(fd, os.urandom(700))",
    "sends without end": "up = descriptors('sockets')[-1]\nwhile True: os.write(up, struct.pack('<cI', b'W', 0))",
    "sends an escape": (
        "for fd in descriptors('sockets'): os.write(fd, struct.pack('<cI', b'W', 0) + b'\\x1b]0;{forged}\\x07')\n"
        "board().put(0, (4, 0.0, 0.0)); time.sleep(60)"
    ),
    "says that it is done": (
        "for fd in descriptors('sockets'): os.write(fd, struct.pack('<cI', b'D', 0))\ntime.sleep(60)"
    ),
    "writes an infinite verdict": "board().put(0, (1, float('inf'), 1.0)); time.sleep(60)",
    "writes a verdict of no kind": "board().put(0, (77, 1.0, 1.0)); time.sleep(60)",
    "is at no completion": "b = board()\nwhile True: b.start(10**12)",
    "stops the clock": (
        "b = board()\nb._AT.pack_into(b._memory, 0, 0, time.monotonic() + 1e9)\n"
        "while True: b._AT.pack_into(b._memory, 0, 0, time.monotonic() + 1e9)"
    ),
    "has just begun": "b = board()\nwhile True:\n    b.start(0)\n    time.sleep(0.001)",
    "exits": "os._exit(0)",
    "exits politely": "sys.exit(0)",
    "aborts": "os.abort()",
    "crashes": "ctypes.string_at(8)",
    "stops": "signal.raise_signal(signal.SIGSTOP)",
    "is interrupted": "raise KeyboardInterrupt",
    "raises no exception": "class Odd(BaseException):\n    def __str__(self): raise SystemExit\nraise Odd",
    "recurses": "def again(): again()\nagain()",
    "recurses in C": "x = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
    "never ends": "while True: pass",
    "ignores its limits": (
        "for number in (signal.SIGXCPU, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\nwhile True: pass"
    ),
    "hangs in a thread": "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)",
    "starts threads": "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "closes everything": "os.closerange(0, 4096)",
    "patches what scores": (
        "import rewards.child as c, rewards.verify as v, tests.rewards.breaches as t\n"
        "t.Executes.score = v.ExactInteger.score = lambda *_: 1.0; c._verdict = lambda *_: ((1, 1.0, 1.0), '')\n"
        "raise LookupError"
    ),
    "patches through frames": (
        "frame = sys._getframe()\nwhile frame:\n"
        "    if 'verifiers' in frame.f_locals:\n"
        "        for v in frame.f_locals['verifiers'].values(): type(v).score = lambda *_: 1.0\n"
        "    frame = frame.f_back\nraise LookupError"
    ),
    "poisons modules": "sys.modules['rollout.types'] = None; import builtins; builtins.float = None; raise LookupError",
    "returns no number": "score = float('nan')",
    "forges an infinite verdict": (
        "board().put(0, (1, float('inf'), 1.0))\n"
        "for fd in descriptors('sockets'): os.write(fd, struct.pack('<cI', b'D', 0))\ntime.sleep(60)"
    ),
    "patches for the next": (
        "import tests.rewards.breaches as t, rewards.verify as v\n"
        "t.Executes.score = v.ExactInteger.score = lambda *_: 1.0"
    ),
}  # fmt: skip
# Where a later protection would have stopped it too, but late.
STOPPED_BY = {"sends without end": "taken over", "stops the clock": "no verdict", "has just begun": "no verdict"}
SURVIVORS = {
    "leaves a child": "subprocess.Popen(['sleep', '{survivor}'])",
    "leaves a child in its own session": "subprocess.Popen(['sleep', '{survivor}'], start_new_session=True)",
    "leaves an orphan": (
        "pid = os.fork()\nif not pid:\n    os.setsid()\n"
        "    if not os.fork(): os.execvp('sleep', ['sleep', '{survivor}'])\n    os._exit(0)\n"
        "os.waitpid(pid, 0); time.sleep(0.2)"
    ),
}


@dataclass
class Scene:
    """What completions could do harm to.

    folder: holds a secret.  victim: a process that waits for this one's end.  met: connections to a port of this
    machine.
    """

    folder: Path
    victim: subprocess.Popen[bytes] = field(default_factory=lambda: _waiting())
    met: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "secret").write_text(SECRET)
        (self.folder / "secret").chmod(0o600)
        os.environ["HF_TOKEN"] = SECRET
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            self.met.append(self._server.accept())

    def code(self, attack: str) -> str:
        """An attack's code with the places of this scene in it."""
        places = {"outside": self.folder, "victim": self.victim.pid, "port": self.port, "owner": os.getpid()}
        return FINDERS + attack.format(secret=SECRET, forged=FORGED, survivor=SURVIVOR, **places)

    def harm(self) -> list[str]:
        """What has changed outside of the scoring processes."""
        found = [f"file {path.name}" for path in self.folder.iterdir() if path.name != "secret"]
        if (self.folder / "secret").exists() is False or (self.folder / "secret").read_text() != SECRET:
            found.append("the secret has changed")
        state = psutil.Process(self.victim.pid).status()
        found += [f"the victim is {state}"] if state not in (psutil.STATUS_SLEEPING, psutil.STATUS_RUNNING) else []
        return found + ["a connection"] * len(self.met)

    def close(self) -> None:
        """Ends the victim."""
        self.victim.kill()
        self.victim.wait()


def _waiting() -> subprocess.Popen[bytes]:
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere)


def survivors() -> list[int]:
    """Processes that a completion has left behind."""
    found = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", SURVIVOR]]
    for process in found:
        process.kill()
    return [process.pid for process in found]


def try_all(scene: Scene, jail: str, only: Sequence[str]) -> list[str]:
    """Every attack in its turn, or only some, each beside completions that are none; what was breached."""
    # Each completion has a process of its own: what one does to its own process is not what is asked here.
    config = RewardsConfig(timeout_s=LIMIT_S, memory_mb=256, jail=jail, isolate="completion", binary_at=None)
    attacks = ANYWHERE | (JAILED if jail != "off" else SURVIVORS)
    attacks = {name: attack for name, attack in attacks.items() if not only or name in only}
    breached = []
    with closing(RewardWorker({"task": Executes(), "exact": ExactInteger()}, config)) as worker:
        for name, attack in attacks.items():
            before, score, after = judge(worker, scene.code(attack))
            if [s.reward for s in (*before, *after)] != [1.0, 0.0, 1.0, 0.0]:
                breached.append(f"{name}: verdicts of others: {before} {after}")
            if score.status is RewardStatus.OK and score.reward:
                breached.append(f"{name}: succeeded")
            if score.status is not RewardStatus.OK and not score.reason.isprintable():
                breached.append(f"{name}: reason {score.reason!a}")
            if STOPPED_BY.get(name, "") not in score.reason:
                breached.append(f"{name}: {score.reason!a}, not {STOPPED_BY[name]}")
            breached += [f"{name}: {what}" for what in scene.harm()]
            print(f"{name}: {score.status.value} {score.reason!a}", file=sys.stderr, flush=True)
    breached += [f"a process survives: {pid}" for pid in survivors()]
    for name, attack in {"reuse": reuse, "burns": burns}.items():
        breached += attack(scene, jail) if not only or name in only else []
    return breached


def judge(worker: RewardWorker, code: str) -> tuple[list[Score], Score, list[Score]]:
    """An attack's score, and those of a right and a wrong answer in front of it and behind."""
    prompt = a_prompt("exact", answer="2")
    sane: list[tuple[Prompt, str]] = [(prompt, "2"), (prompt, "3")]
    scores = worker.score_texts([*sane, (a_prompt("task"), code), *sane])
    return scores[:2], scores[2], scores[3:]


def reuse(scene: Scene, jail: str) -> list[str]:
    """In a process that is used again: it is replaced after a completion that made its verifier raise."""
    config = RewardsConfig(timeout_s=LIMIT_S, jail=jail, binary_at=None)
    with closing(RewardWorker({"task": Executes(), "exact": ExactInteger()}, config)) as worker:
        attack = scene.code(ANYWHERE["patches what scores"])
        before, _, after = judge(worker, attack)
        return [] if [s.reward for s in (*before, *after)] == [1.0, 0.0, 1.0, 0.0] else [f"patched for later: {after}"]


def burns(scene: Scene, jail: str) -> list[str]:
    """A thread that goes on after its verdict is ended by the limit on processor time."""
    config = RewardsConfig(timeout_s=LIMIT_S, jail=jail, binary_at=None)
    with closing(RewardWorker({"task": Executes()}, config)) as worker:
        code = "def burn():\n    while True: pass\nthreading.Thread(target=burn, daemon=True).start()"
        worker.score_texts([(a_prompt("task"), scene.code(code.replace("{", "{{").replace("}", "}}")))])
        process = psutil.Process(worker.describe()["pids"][0])
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    return []
                if process.cpu_times().user > 20:
                    return ["burns on after its verdict"]
            except psutil.NoSuchProcess:
                return []
            time.sleep(0.1)
        return ["neither burns nor ends"]


class Executes:
    """The verifier that nobody should write: it does what a completion says."""

    def score(self, completion: str, prompt: Prompt) -> Any:
        """What the completion sets `score` to."""
        names: dict[str, Any] = {"score": 0.0}
        exec(completion, names)
        return names["score"]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jail", default="require")
    parser.add_argument("--only", nargs="*", default=())
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
    scene = Scene(given.folder)
    try:
        print(json.dumps(try_all(scene, given.jail, given.only)))
    finally:
        scene.close()


if __name__ == "__main__":
    # By its own name, so that the scoring process finds the verifier.
    from tests.rewards import breaches

    breaches.main()
