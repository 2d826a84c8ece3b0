"""Random draws that depend on names alone: never on batch order, worker count or what was drawn before."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

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


def draw_tokens(
    logprobs: Float[Tensor, "rows vocabulary"], rows: Int[Tensor, " samples"], uniforms: Float[Tensor, " samples"]
) -> Int[Tensor, " samples"]:
    """One token a sample, where the cumulative distribution of its row passes its own draw in [0, 1).

    In two levels, so that nothing in float64 is as large as `logprobs`: first a block of the vocabulary by the
    blocks' sums, then a token within it by what is left of the draw.  A row's sums depend on that row alone.

    Args:
        rows: each sample's row of `logprobs`.
    """
    words = logprobs.shape[-1]
    size = math.isqrt(words)
    p = logprobs.new_zeros(len(logprobs), -(-words // size), size)
    torch.exp(logprobs, out=p.view(len(logprobs), -1)[:, :words])
    block, left = _place(p.sum(dim=-1).double()[rows], uniforms)
    within, _ = _place(p[rows, block].double(), left)
    return block * size + within


def _place(
    masses: Float[Tensor, "samples parts"], draws: Float[Tensor, " samples"]
) -> tuple[Int[Tensor, " samples"], Float[Tensor, " samples"]]:
    """The part of positive mass that each draw falls into, and how far it reaches into it, in [0, 1]."""
    cumulative = masses.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = draws[:, None].double() * total
    found = torch.searchsorted(cumulative, target, right=True)
    # A draw that was rounded up to 1 falls on the last part of positive mass.
    found = torch.minimum(found, (cumulative < total).sum(dim=-1, keepdim=True))
    mass = masses.gather(1, found)
    below = cumulative.gather(1, found) - mass
    return found[:, 0], ((target - below) / mass).clamp(0, 1)[:, 0]
