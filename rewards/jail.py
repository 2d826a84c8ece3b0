"""Confinement of a process by the kernel: Landlock for files, seccomp for system calls.

A thin layer over two Linux interfaces (landlock(7), seccomp(2)) that have no well-kept binding for Python.  Neither
needs privileges, and neither can be undone: it is for a process that does nothing else afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_NO_NEW_PRIVS, _PR_GET_SECCOMP, _PR_SET_SECCOMP = 38, 21, 22
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # Landlock's calls have these numbers everywhere
_VERSION = 1
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
# The rights on files that each version of Landlock knows: the first so many bits.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

# What a Python that computes needs.  Not here: starting processes or programs, signals, sockets, other processes'
# memory, and all that changes files.  Columns: x86_64, aarch64 (a dash where there is none).
_HARMLESS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, lseek 8 62, close 3 57, dup 32 23, dup2 33 -, dup3
292 24, fcntl 72 25, ioctl 16 29, pipe 22 -, pipe2 293 59, eventfd2 290 19, poll 7 -, ppoll 271 73, select 23 -,
pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, stat 4 -, lstat 6 -,
fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2
439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49, fadvise64 221 223, mmap 9
222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, mincore 27 232, msync 26 227, brk 12 214, futex
202 98, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293, membarrier 324 283, sched_yield 24 124,
sched_getaffinity 204 123, sched_getparam 143 121, sched_getscheduler 145 120, getcpu 309 168, arch_prctl 158 -,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
sigaltstack 131 132, restart_syscall 219 128, alarm 37 -, pause 34 -, getitimer 36 102, setitimer 38 103, nanosleep 35
101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100
153, getrusage 98 165, sysinfo 99 179, uname 63 160, getrandom 318 278, getpid 39 172, gettid 186 178, getppid 110
173, getpgid 121 155, getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118
148, getresgid 120 150, getgroups 115 158, getpriority 140 141, umask 95 166, exit 60 93, exit_group 231 94
"""
# Allowed for some arguments only; see `_program`.
_JUDGED = "openat 257 56, clone 56 220, clone3 435 435, prlimit64 302 261, tgkill 234 131"
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # a column, and what seccomp calls it
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _BITS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # of the filter's machine
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in what the filter sees of a call
_X32 = 0x40000000  # numbers of x86_64's other interface begin here


class JailError(OSError):
    """The kernel has refused to confine this process."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """What this machine's kernel can confine.

    landlock: its version; 0 for none.  seccomp: whether filters of system calls can be had, and are known here for
    this processor.
    """

    landlock: int
    seccomp: bool

    @property
    def missing(self) -> list[str]:
        """Names of what is not there."""
        return [name for name, there in (("Landlock", self.landlock), ("seccomp", self.seccomp)) if not there]


def kernel() -> Kernel:
    """What can be had on this machine, asked of its kernel."""
    if not hasattr(os, "uname") or os.uname().sysname != "Linux":
        return Kernel(landlock=0, seccomp=False)
    version = _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION))
    # Without filters this call does not exist; with them, no filter at all at address 0 is a bad address.
    _LIBC.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_void_p(None), 0, 0)
    filters = ctypes.get_errno() == errno.EFAULT
    return Kernel(landlock=max(0, version), seccomp=filters and platform.machine() in _ARCHITECTURES)


def confine(readable: Iterable[str], found: Kernel) -> None:
    """Confine this process, which must have one thread, as far as `found` says that it can be.

    With Landlock it opens nothing but what is readable, and writes no file but the null device.  With seccomp it
    starts no process, runs no program, signals nobody, opens no socket, raises no limit; without Landlock it then
    opens files for reading only.

    readable: files, and folders with all that is in them.

    Raises:
        JailError: the kernel has refused.
    """
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    if found.landlock:
        _restrict_files(readable, found.landlock)
    if found.seccomp:
        _filter_calls(read_only=not found.landlock)


def _restrict_files(readable: Iterable[str], version: int) -> None:
    every = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    rules = _LIBC.syscall(_CREATE_RULESET, struct.pack("<Q", every), ctypes.c_size_t(8), ctypes.c_uint(0))
    _check(rules, "Landlock's rules")
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR)
        _allow(rules, os.devnull, _READ_FILE | _WRITE_FILE)
        _check(_LIBC.syscall(_RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint(0)), "Landlock")
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there need not be readable
    try:
        if not os.path.isdir(path):
            rights &= ~_READ_DIR
        rule = struct.pack("<Qi", rights, opened)
        _check(_LIBC.syscall(_ADD_RULE, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0)), path)
    finally:
        os.close(opened)


def _filter_calls(read_only: bool) -> None:
    program = _program(platform.machine(), os.getpid(), read_only)
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    length_and_address = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, 2, length_and_address, 0, 0), "seccomp")


Instruction = tuple[int, int, int, int]


def _program(machine: str, pid: int, read_only: bool) -> list[Instruction]:
    """The filter: every call that is not harmless fails with EPERM."""
    column, architecture = _ARCHITECTURES[machine]
    judged = _numbers(_JUDGED, column)
    refuse, allow = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), refuse,
    ]  # fmt: skip
    for number in _numbers(_HARMLESS, column).values():
        program += [(_EQUAL, 0, 1, number), allow]
    # glibc then takes clone, whose flags can be seen here: a thread is fine, a process is not.
    program += [(_EQUAL, 0, 1, judged["clone3"]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    cases: dict[str, list[Instruction]] = {
        "clone": [_argument(0), (_BITS, 0, 1, _CLONE_THREAD), allow],
        "openat": [_argument(2), (_BITS, 1, 0, _WRITING), allow] if read_only else [allow],
        "prlimit64": [_argument(2), (_EQUAL, 0, 3, 0), _argument(2, high=True), (_EQUAL, 0, 1, 0), allow],
        "tgkill": [_argument(0), (_EQUAL, 0, 1, pid), allow],
    }
    for name, case in cases.items():
        program += [(_EQUAL, 0, len(case) + 1, judged[name]), *case, refuse]
    return [*program, refuse]


def _argument(index: int, high: bool = False) -> Instruction:
    """Load half of an argument; both known architectures have the low half first."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * high)


def _numbers(table: str, column: int) -> Mapping[str, int]:
    rows = (row.split() for row in table.replace("\n", " ").split(",") if row.strip())
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise JailError(number, f"{what}: {os.strerror(number)}")
