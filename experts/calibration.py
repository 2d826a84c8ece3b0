"""Input projections that start from what the experts' states look like, not blind.

An expert's states lie near a few directions: a tiny model's chain_sum states hold 92 % of their
variance in four, and neighbouring answers differ in the small ones.  Blind projections leave a router
to learn those last.  So the projections start as a blind projection of the whitened states: zero mean
and unit variance in every direction that matters.  Only starting weights change, as in the data-dependent
initialisation of Krähenbühl et al. (arXiv 1511.06856).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

CONSTANT = 1e-12


@torch.no_grad()
def whiten_input(project: nn.Linear, states: Float[Tensor, "rows width"], ridge: float) -> None:
    """Folds the whitening of `states` into a freshly made projection, in place.

    Args:
        project: its weights must still be those of torch's default initialisation.
        ridge: directions with less than this share of the largest variance stay small: they are noise.
    """
    rows = states.double()
    mean = rows.mean(dim=0)
    variances, directions = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    variances = variances.clamp_min(0)
    if variances.max() < CONSTANT:  # an expert that says the same of every prompt
        return
    floor = ridge * variances.max()
    kept = (variances / (variances + floor)).sum()
    # Turned back into the states' own axes, the result does not depend on the signs eigh happens to choose.
    whiten = directions * (variances + floor).rsqrt() @ directions.T
    blind = project.weight.double() * (3 * project.in_features) ** 0.5
    weight = blind @ whiten / kept.sqrt()
    project.weight.copy_(weight)
    project.bias.copy_(-weight @ mean)
