"""Environment of every process of a run; must be set before torch and Ray are imported."""

from __future__ import annotations

PROCESS_ENVIRONMENT = {
    # No usage statistics, no look-ups behind the user's back.
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Waiting threads sleep instead of spinning: workers share cores, and spinning made steps many times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Large blocks of memory come in large pages: about a tenth less time a step on CPU.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "TOKENIZERS_PARALLELISM": "false",
    # A dead worker fails several references of a call; one of them is waited for, and tells.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    # Loading bars of worker processes would garble the display.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
