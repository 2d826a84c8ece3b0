"""Importing this module imports what every run needs, in a process that is there for nothing else.

See `cluster.run.launched`.
"""

from __future__ import annotations

import importlib
import os
import sys

NEEDED = (
    "cluster.cli",
    "cluster.run.training",
    "matplotlib.figure",
    "reasoning_gym",
    "tensorboard",
)

if sys.argv[0] == "-c":  # in that process
    os.setsid()  # what ends a sweep's process group must not end the parent of its runs before them
for name in NEEDED:
    importlib.import_module(name)

import torch  # noqa: E402 - the session comes first

from experts.loading import import_transformers  # noqa: E402
from learner.engine import import_deepspeed  # noqa: E402

import_transformers()
if not torch.cuda.is_available():  # with GPUs it looks at them, and processes that use them could not be forked
    import_deepspeed()
