"""The jail of the scoring processes, with each of its protections switched off in turn, and its filter of calls."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from rewards import jail
from rewards.child import Board
from rewards.config import RewardsConfig
from rewards.verify import RewardsError
from rewards.worker import RewardWorker
from rollout.types import RewardStatus
from tests.rewards.breaches import ANYWHERE, FORGED, JAILED, SURVIVORS, Executes
from tests.rewards.test_worker import gone
from tests.rewards.verifiers import Obedient, a_prompt

ROOT = Path(__file__).parents[2]


def breaches(folder: Path, *line: str, root: Path = ROOT, limit_s: float = 240) -> list[str]:
    """What `breaches.py` prints, with what it should not have printed."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.rewards.breaches", str(folder), *line]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stderr
    printed = [f"printed {FORGED}"] * (done.stdout + done.stderr).replace("\\", "").count(f"\n{FORGED}")
    return [*json.loads(done.stdout.splitlines()[-1]), *printed]


def test_no_completion_gets_out_of_the_jail(tmp_path: Path) -> None:
    assert len(ANYWHERE | JAILED) >= 60
    assert breaches(tmp_path / "outside", "--jail", "require") == []


def test_without_a_jail_nobody_is_deceived_and_nothing_survives(tmp_path: Path) -> None:
    assert breaches(tmp_path / "outside", "--jail", "off") == []


MUTATIONS = {
    "Landlock": ("jail.py", "if found.landlock:", "if False:", ["writes a file"]),
    "reading": ("zygote.py", "readable=_readable()", 'readable=("/",)', ["reads a file"]),
    "seccomp": ("jail.py", "if found.seccomp:", "if False:", ["forks"]),
    "threads alone": ("jail.py", "(_BITS, 0, 1, _CLONE_THREAD), allow]", "allow]", ["forks"]),
    "own threads alone": ("jail.py", "(_EQUAL, 0, 1, pid), allow]", "allow]", ["kills a thread of another"]),
    "limits are looked at": ("jail.py", '"prlimit64": [', '"prlimit64": [allow] and [allow,',
                             ["raises another's limit"]),
    "environment": ("zygote.py", "env=_jail_environment() if self._jailed else None", "env=None",
                    ["reads its environment"]),
    "folder": ("zygote.py", "_working_folder(limits.jailed)", "_working_folder(False)", ["finds files in its folder"]),
    "descriptors": ("zygote.py", "os.closerange(3, _FIRST_DESCRIPTOR)", "pass", ["has other descriptors"]),
    "output": ("zygote.py", "os.dup2(null, standard)", "pass", ["prints"]),
    "memory": ("child.py", 'resource.RLIMIT_DATA: held["VmData"] + limits.memory,', "", ["eats memory"]),
    "address space": ("child.py", 'resource.RLIMIT_AS: held["VmSize"] + limits.memory + _OUTSIDE_DATA,', "",
                      ["eats shared memory"]),
    "processor time": ("child.py", "resource.RLIMIT_CPU: limits.cpu_s,", "", ["burns"]),
    "core": ("child.py", "resource.RLIMIT_CORE: 0,", "", ["may dump its memory"]),
    "file size": ("child.py", "resource.RLIMIT_FSIZE: 0,", "", ["may write files"]),
    "open files": ("child.py", ", resource.RLIMIT_NOFILE: OPEN_FILES", "", ["opens many files"]),
    "seals": ("pool.py", "fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)", "", ["shrinks the board"]),
    "subreaper": ("zygote.py", "while strays :=", "while False and", ["leaves a child in its own session"]),
    "orphans": ("zygote.py", "ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)", "", ["leaves an orphan"]),
    "replacement": ("child.py", "if verdict[0] == Kind.FAILED:", "if False:", ["reuse"]),
    "a process each": ("worker.py", 'reuse = 1 if self._config.isolate == "completion" else', "reuse =",
                       ["patches for the next"]),
    "no pickle": ("child.py", "if not _MESSAGE.size <=",
                  'if message[:1] == b"\\x80":\n        pickle.loads(message)\n    if not _MESSAGE.size <=',
                  ["sends a pickle"]),
    "number of messages": ("pool.py", "if messages > count + 2 or index > count:", "if False:",
                           ["sends without end"]),
    "finite verdicts": ("child.py", "and math.isfinite(reward) and math.isfinite(answer)", "",
                        ["forges an infinite verdict"]),
    "own clock": ("pool.py", "since = min(since, seen_at) if index == seen >= 0 else seen_at", "pass",
                  ["stops the clock"]),
    "plain text": ("child.py", "if c.isprintable() else", "if True else", ["sends an escape"]),
}  # fmt: skip
WITHOUT_JAIL = {*SURVIVORS, "shrinks the board"}


@pytest.mark.slow
@pytest.mark.parametrize("protection", MUTATIONS)
def test_every_protection_is_needed(protection: str, tmp_path: Path) -> None:
    file, old, new, attacks = MUTATIONS[protection]
    for package in ("rewards", "rollout", "experts", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "rewards" / file
    text = path.read_text()
    assert text.count(old) == 1, "the code has moved on: mend the mutation"
    mutant = text.replace(old, new)
    compile(mutant, file, "exec")
    path.write_text(mutant)
    mode = "off" if WITHOUT_JAIL & set(attacks) else "require"
    try:
        found = breaches(tmp_path / "outside", "--jail", mode, "--only", *attacks, root=tmp_path, limit_s=60)
    except (AssertionError, subprocess.TimeoutExpired) as error:  # the owner itself was brought down
        found = [str(error)]
    print(found)
    assert found
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in word for word in process.info["cmdline"] or ()):
            process.kill()


def test_a_process_that_says_that_it_has_just_begun_is_late_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(RewardWorker({"task": Obedient()}, RewardsConfig(timeout_s=0.3))) as worker:
        monkeypatch.setattr(Board, "at", lambda self: (0, time.monotonic()))
        assert worker.score_texts([(a_prompt(), "sleep 60")])[0].status is RewardStatus.TIMEOUT


def test_a_scoring_process_ends_with_its_zygote() -> None:
    with closing(RewardWorker({"task": Obedient()}, RewardsConfig())) as worker:
        (pid,) = worker.describe()["pids"]
        zygote = psutil.Process(pid).parent()
        assert zygote is not None
        zygote.kill()
        assert gone(pid)
        # Whoever comes next gets new ones.
        assert worker.score_texts([(a_prompt(), "0.5"), (a_prompt(), "1")])[1].reward == 1.0


def test_a_task_that_is_let_out_of_the_jail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "1")
    config = RewardsConfig(jail_exempt=("free",), binary_at=None)
    with closing(RewardWorker({"free": Executes(), "task": Executes()}, config)) as worker:
        code = "import os, socket; score = float(os.environ.get('JUDGE_TOKEN', 0)); socket.socket()"
        free, jailed = worker.score_texts([(a_prompt("free"), code), (a_prompt("task"), code)])
    assert (free.reward, free.status.value, jailed.status.value) == (1.0, "ok", "error")


def test_a_jail_that_is_required_and_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "kernel", lambda: jail.Kernel(landlock=0, seccomp=True))
    with pytest.raises(RewardsError, match=r"rewards.jail: require, but this machine's kernel has no Landlock"):
        RewardWorker({"task": Obedient()}, RewardsConfig(jail="require"))


def test_without_landlock_files_are_opened_for_reading_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jail, "kernel", lambda: jail.Kernel(landlock=0, seccomp=True))
    (tmp_path / "file").write_text("1.0")
    codes = [f"open('{tmp_path}/new', 'w')", f"score = float(open('{tmp_path}/file').read())"]
    with closing(RewardWorker({"task": Executes()}, RewardsConfig(binary_at=None))) as worker:
        scores = worker.score_texts([(a_prompt("task"), code) for code in codes])
    assert [score.status.value for score in scores] == ["error", "ok"]
    assert not (tmp_path / "new").exists()


# Calls as Linux numbers them: x86_64, and the table that aarch64 shares with all younger processors.
HARMFUL = {
    "x86_64": {"open": 2, "socket": 41, "socketpair": 53, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
               "ptrace": 101, "unlink": 87, "mount": 165, "setrlimit": 160, "process_vm_readv": 310,
               "memfd_create": 319, "bpf": 321, "execveat": 322, "userfaultfd": 323, "io_uring_setup": 425,
               "openat2": 437, "x32 fork": 0x40000039},
    "aarch64": {"unlinkat": 35, "mount": 40, "ptrace": 117, "kill": 129, "tkill": 130, "setrlimit": 164, "socket": 198,
                "socketpair": 199, "execve": 221, "process_vm_readv": 270, "memfd_create": 279, "bpf": 280,
                "execveat": 281, "io_uring_setup": 425, "openat2": 437},
}  # fmt: skip
THREAD = 0x3D0F00


@pytest.mark.parametrize("machine", HARMFUL)
def test_the_filter_of_calls(machine: str) -> None:
    program = jail._program(machine, pid=77, read_only=True)
    _, architecture = jail._ARCHITECTURES[machine]
    judged = jail._numbers(jail._JUDGED, jail._ARCHITECTURES[machine][0])

    def verdict(number: int, *arguments: int, architecture: int = architecture) -> int:
        return run(program, number, architecture, [*arguments, *[0] * (6 - len(arguments))])

    refused, allowed = jail._ERRNO | errno.EPERM, jail._ALLOW
    assert {name: verdict(number) for name, number in HARMFUL[machine].items()} == dict.fromkeys(
        HARMFUL[machine], refused
    )
    assert verdict(judged["clone"], int(signal.SIGCHLD)) == refused
    assert verdict(judged["clone"], THREAD) == allowed
    assert verdict(judged["clone3"]) == jail._ERRNO | errno.ENOSYS
    assert [verdict(judged["tgkill"], pid, pid, 9) for pid in (77, 78)] == [allowed, refused]
    assert [verdict(judged["prlimit64"], 0, 7, new) for new in (0, 1, 1 << 32)] == [allowed, refused, refused]
    writing = (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)
    assert verdict(judged["openat"], 0, 0, os.O_RDONLY | os.O_CLOEXEC) == allowed
    assert {verdict(judged["openat"], 0, 0, flag) for flag in writing} == {refused}
    assert verdict(0 if machine == "x86_64" else 63) == allowed  # read
    assert verdict(0, architecture=0x40000003) == jail._KILL  # the same numbers mean other calls on i386


def run(program: list[jail.Instruction], number: int, architecture: int, arguments: list[int]) -> int:
    """What the kernel's machine makes of a call."""
    words = [number, architecture, 0, 0, *[word for a in arguments for word in (a & 0xFFFFFFFF, a >> 32)]]
    accumulator, at = 0, 0
    while True:
        code, yes, no, value = program[at]
        at += 1
        if code == jail._RETURN:
            return value
        if code == jail._LOAD:
            accumulator = words[value // 4]
            continue
        holds = {
            jail._EQUAL: accumulator == value,
            jail._BITS: bool(accumulator & value),
            jail._AT_LEAST: accumulator >= value,
        }[code]
        at += yes if holds else no
