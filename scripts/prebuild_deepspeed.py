"""Compiles DeepSpeed's CPU communication op now, so that the first training does not wait for it.

Where there is a GPU, DeepSpeed needs no such op and there is nothing to do.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from learner.compiled import drop_stale_lock


def main() -> int:
    """Builds the op; the exit status."""
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed may take a driver without a device for a GPU
    # torch calls `ninja` by name; pip put it beside the interpreter.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if lock := drop_stale_lock():
        print(f"removed the lock of a build that was killed: {lock}")

    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        print("not needed on this machine")
        return 0
    started = time.monotonic()
    try:
        builder.load()
    except (RuntimeError, ImportError) as error:
        print("error: DeepSpeed's communication op does not compile:", file=sys.stderr)
        print("\n".join(str(error).splitlines()[-15:]), file=sys.stderr)
        return 1
    print(f"ready after {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
