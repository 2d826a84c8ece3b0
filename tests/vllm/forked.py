"""Imported by the process that measured engines are forked from: a start then costs seconds, not half a minute.

What an engine computes is the same; only how its two processes come to be is another.
"""

from __future__ import annotations

import multiprocessing

import vllm.v1.engine.core
import vllm.v1.worker.cpu_model_runner
import vllm.v1.worker.cpu_worker  # noqa: F401 (imported so that a fork has it)
from vllm.model_executor.models import registry
from vllm.v1.executor import multiproc_executor

PRELOADED = "tests.vllm.forked"

multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
registry._run_in_subprocess = lambda inspected: inspected()


def fork_engines() -> None:
    """Starts every further engine of this process so."""
    from vllm.v1.engine import utils

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    utils.get_mp_context = lambda: context
