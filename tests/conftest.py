"""The environment every test runs in, set before anything heavy is imported."""

from __future__ import annotations

import os

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Tiny models lose more to hand-shakes between threads than they gain, and one thread adds up in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # reads OMP_NUM_THREADS when imported

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
