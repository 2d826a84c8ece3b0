"""Random draws that depend on names alone: never on batch order, worker count or what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np

from rollout.types import Draws


def generator(*name: int | str) -> np.random.Generator:
    """A counter-based generator for a name such as (seed, ordinal, sample, version, "tokens")."""
    digest = hashlib.blake2b("|".join(map(str, name)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def token_uniforms(seed: int, ordinal: int, version: int, samples: int, length: int) -> np.ndarray:
    """(samples, length) float64 in [0, 1): every completion of a prompt has its own stream of draws.

    Straight from SHAKE-128, whose output only grows with the length; building a numpy generator for
    each completion took longer than the engine's own sampling.
    """
    streams = (
        hashlib.shake_128("|".join(map(str, (seed, ordinal, sample, version, "tokens"))).encode()).digest(8 * length)
        for sample in range(samples)
    )
    bits = np.frombuffer(b"".join(streams), dtype="<u8").reshape(samples, length)
    return (bits >> 11) * 2.0**-53


def choice_uniform(seed: int, ordinal: int, version: int) -> float:
    """The draw in [0, 1) behind a router's choice for a prompt."""
    return float(generator(seed, ordinal, version, "choice").random())


def request_seed(seed: int, ordinal: int, version: int) -> int:
    """For an engine that draws by itself: below 2**31, so that it may count samples up from there."""
    digest = hashlib.blake2b("|".join(map(str, (seed, ordinal, version, "request"))).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def collaborator_draws(seed: int, ordinal: int, version: int, experts: int, dropout: float) -> Draws:
    """Which experts a group's router sees; at least one always stays."""
    visible = np.ones(experts, dtype=bool)
    if dropout > 0:
        rng = generator(seed, ordinal, version, "experts")
        visible = rng.random(experts) >= dropout
        if not visible.any():
            visible[rng.integers(experts)] = True
    return Draws(expert_mask=visible)
