"""Runs a command whose run folder lies on a small file system of its own, which fills up while the command works, or is
read-only from the start; then again with the disk mended.

For `unshare --map-root-user --mount`, so that nothing of it outlives the process.

usage: small_disk.py {full,read-only} FOLDER METRICS COMMAND...
"""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from pathlib import Path

SIZE_MB, DEADLINE_S = 300, 240.0


def fill(folder: Path) -> None:
    """Writes until nothing fits any more."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**16))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def main(how: str, folder: Path, metrics: Path, command: list[str]) -> int:
    """Exit status of the command when its disk failed it; 99 when it never got so far."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(folder)], check=True)
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        failed = subprocess.run(command, check=False, timeout=DEADLINE_S).returncode
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        return failed if subprocess.run(command, check=False, timeout=DEADLINE_S).returncode == 0 else 98
    with subprocess.Popen(command) as child:
        until = time.monotonic() + DEADLINE_S
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            if child.poll() is not None or time.monotonic() > until:
                child.kill()
                return 99
            time.sleep(0.02)
        fill(folder)
        failed = child.wait(DEADLINE_S)
    print(f"the command ended with {failed}; its disk is mended, and it goes on", file=sys.stderr, flush=True)
    (folder / "filler").unlink()
    again = subprocess.run([*command, "--resume"], check=False, timeout=DEADLINE_S).returncode
    steps = metrics.read_bytes().count(b"\n")
    print(f"resumed: exit status {again} after {steps} steps", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
