"""Which vLLM is installed, and how its processes are told to behave."""

from __future__ import annotations

import importlib.metadata
import os

from packaging.specifiers import SpecifierSet

from experts.loading import ModelError

SUPPORTED = SpecifierSet(">=0.32,<0.33")
INSTALL = "run make install-vllm"
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Workers share the cores of a machine: bound to the same ones they would wait for each other.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def check_installed() -> None:
    """Refuses a vLLM that is absent or of another version.

    Raises:
        ModelError: naming the version that is there and the remedy.
    """
    found = version()
    if found is None:
        raise ModelError(f"engine: vllm needs vLLM {SUPPORTED}, which is not installed: {INSTALL}")
    if not SUPPORTED.contains(found.partition("+")[0], prereleases=True):
        raise ModelError(f"engine: vllm needs vLLM {SUPPORTED}, version {found} is installed: {INSTALL}")


def version() -> str | None:
    """Of the build for GPUs or the one for CPUs, whichever is installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_for_cpus() -> bool:
    """Whether the installed build is the one for CPUs, which is a distribution of its own."""
    try:
        return bool(importlib.metadata.version("vllm-cpu"))
    except importlib.metadata.PackageNotFoundError:
        return False


def supports(architecture: str) -> bool:
    """Whether vLLM has a model class of this name; importing it takes seconds."""
    os.environ.update(ENVIRONMENT)
    from vllm import ModelRegistry

    return architecture in ModelRegistry.get_supported_archs()
