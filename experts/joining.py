"""One more expert for a trained router: its own projection, mark, norm and gate reader train, and nothing else.

`router.init` and `router.add_expert` together: the saved weights stand still, bit for bit, and the new expert learns to
speak the language that the router's latents already read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from experts.router import Perceiver, real_states
from experts.state import Arrays, fitted

# Of a parameter that belongs to one expert, up to its index; the rest belongs to all of them.
OF_ONE = re.compile(r"^(project|expert_embedding|norms|choose\.read)\.(\d+)(?=\.|$)")
NOTICED = -3.0  # log-odds of the new expert's attention against all others': one part in twenty


def is_of(name: str, experts: Sequence[int]) -> bool:
    """Whether an array of a router belongs to one of these experts alone."""
    match = OF_ONE.match(name)
    return match is not None and int(match[2]) in experts


def moved(arrays: Arrays, places: Sequence[int]) -> Arrays:
    """The same arrays with expert `i` in place `places[i]`."""

    def name(old: str) -> str:
        return OF_ONE.sub(lambda match: f"{match[1]}.{places[int(match[2])]}", old, count=1)

    return {name(old): array for old, array in arrays.items()}


def with_newcomers(saved: Arrays, fresh: Arrays, places: Sequence[int], new: Sequence[int], where: str) -> Arrays:
    """A saved router's arrays in the places that its experts have here, and fresh ones for the new experts.

    Raises:
        RouterError: naming what is missing or has another shape.
    """
    known = {name: array for name, array in fresh.items() if not is_of(name, new)}
    return {**fresh, **fitted(moved(saved, places), known, where)}


def train_only(router: nn.Module, experts: Sequence[int]) -> None:
    """Leaves only what belongs to these experts to train."""
    for name, parameter in router.named_parameters():
        parameter.requires_grad_(is_of(name, experts))


@torch.no_grad()
def settle(
    router: Perceiver, features: Sequence[Float[Tensor, "batch tokens width"]], new: Sequence[int], ridge: float
) -> None:
    """Starts new experts, fresh beside a trained router's weights, from the experts' states on some training prompts.

    Their projections are calibrated as a fresh router's.  Their gate readers stay zero, so that no choice changes.  A
    softmax over more keys always takes attention from the others: a fresh mark would take as much as chance gives it,
    a half from a single expert, and what the latents gather would be half noise.  So each new mark is moved, as little
    as possible, to where every latent and head attends to the new expert one part in twenty on average: the router says
    nearly what it said, and the gradient still reaches the new expert.  Zero attention would be no disturbance and no
    gradient either.
    """
    router.calibrate(features, ridge, only=new)
    asked = [
        _wanted(router, state, real_states(part)) for state, part in zip(router.states(features), features, strict=True)
    ]
    others = [odds for index, odds in enumerate(asked) if index not in new]
    if router.null is not None:
        others.append(router.scores(router.null[None, None])[..., 0].expand_as(others[0]))
    known = torch.stack(others).logsumexp(dim=0)
    query = router.by_head(router.query(router.latents))
    key = router.key.weight.unflatten(0, (router.heads, -1))
    reach = (query @ key / query.shape[-1] ** 0.5).flatten(0, 1).double()  # of a mark, for each head and latent
    back = torch.linalg.pinv(reach, rtol=1e-4)
    for index in new:
        missing = NOTICED - (asked[index] - known).mean(dim=0)
        router.expert_embedding[index].add_((back @ missing.flatten().double()).float())


def _wanted(
    router: Perceiver, states: Float[Tensor, "batch tokens width"], real: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch heads latents"]:
    """What an expert's states weigh together in every latent's and head's softmax, as a logarithm."""
    return router.scores(states).masked_fill(~real[:, None, None, :], float("-inf")).logsumexp(dim=-1)
