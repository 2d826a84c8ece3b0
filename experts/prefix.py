"""Fingerprints of a soft prefix, so that the learner can tell the one it rebuilt from another."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Float
from torch import Tensor


def prefix_hash(prefix: Float[Tensor, "slots width"]) -> str:
    """Hash of a prefix's float32 bytes, as handed to the engine."""
    return hashlib.blake2b(prefix.detach().float().cpu().numpy().tobytes(), digest_size=16).hexdigest()


def sketch(prefix: Float[Tensor, "batch slots width"]) -> np.ndarray:
    """(batch, slots) float32: each slot's projection on a fixed unit direction.

    Matrix products of different batch sizes differ in their last bits, so a hash alone cannot tell
    another prefix from the same one computed elsewhere; the sketch can, within a tolerance.
    """
    width = prefix.shape[-1]
    direction = np.random.Generator(np.random.Philox(key=width)).standard_normal(width).astype(np.float32)
    return (prefix.detach().float().cpu().numpy() @ (direction / np.linalg.norm(direction))).astype(np.float32)
