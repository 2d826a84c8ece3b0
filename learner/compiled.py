"""DeepSpeed's CPU communication op, which it compiles at its first start, and the lock that a killed build leaves."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

OP = "deepspeed_shm_comm"
LONGEST_BUILD_S = 180.0


def op_folder() -> Path:
    """Where torch keeps its build of DeepSpeed's CPU communication op (torch's own rule, CUDA or CPU)."""
    if root := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(root) / OP
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    build = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    return Path(get_default_build_root()) / f"{python}_{build}" / OP


def stale_lock(folder: Path) -> Path | None:
    """The lock of a build in `folder` that no process holds: left by one that was killed, it blocks all later ones.

    torch's lock is a file that its holder keeps open until it removes it.
    """
    lock = (folder / "lock").resolve()
    if not lock.exists():
        return None
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == lock for file in process.open_files()):
                return None
        except psutil.Error:  # gone meanwhile, or another user's, who has a cache of their own
            continue
    return lock


def drop_stale_lock() -> Path | None:
    """Removes the lock of a build that was killed, which would block every later start; returns it if there was one.

    The folder may be shared with other machines or containers, whose processes cannot be seen here: only a lock
    older than any build takes is stale, and a younger one is waited for.
    """
    while (lock := stale_lock(op_folder())) is not None:
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            return None
        if age > LONGEST_BUILD_S:
            lock.unlink(missing_ok=True)
            return lock
        time.sleep(1.0)
    return None
