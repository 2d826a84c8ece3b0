"""The Perceiver router: hidden states of frozen experts in, a soft prefix for a frozen policy out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from experts.calibration import whiten_input
from experts.config import RouterConfig


class RouterOutput(NamedTuple):
    """prefix: (batch, latents, policy width); attention: (batch, heads, latents, experts), 1 in sum over experts."""

    prefix: Float[Tensor, "batch latents width"]
    attention: Float[Tensor, "batch heads latents experts"]


class Perceiver(nn.Module):
    """Learned latent queries cross-attend to the experts' projected states (PAPER: 8 latents, 8 heads, width 512).

    Every expert's (tokens, width) feature, normalised by the expert, is projected to the shared width
    and marked with a learned expert embedding; a hidden expert takes no part.  The output projection
    starts near zero.

    Args:
        widths: hidden width of each expert, in the run's expert order.
        policy_width: width of the policy's token embeddings.
        embedding_rms: root mean square of the policy's token embeddings, the unit of `prefix.scale`.
        anchors: (anchors, policy width) embeddings that the prefix starts from, or None.
        learned_norms: which experts' normalised states get a trained gain and bias.
    """

    anchors: Tensor | None

    def __init__(
        self,
        config: RouterConfig,
        widths: Sequence[int],
        policy_width: int,
        embedding_rms: float,
        anchors: Float[Tensor, "anchors width"] | None = None,
        learned_norms: Sequence[bool] = (),
    ) -> None:
        super().__init__()
        flags = learned_norms or [False] * len(widths)
        self.norms = nn.ModuleList(
            nn.LayerNorm(w) if learned else nn.Identity() for w, learned in zip(widths, flags, strict=True)
        )
        width, self.heads = config.width, config.heads
        self.project = nn.ModuleList(nn.Linear(expert_width, width) for expert_width in widths)
        # Unit-sized latents and expert marks: slots and experts differ from the first step on.
        self.expert_embedding = nn.Parameter(torch.randn(len(widths), width))
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.merge = nn.Linear(width, width), nn.Linear(width, width)
        for layer in (self.query, self.key, self.value, self.merge):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        hidden = int(width * config.feedforward)
        self.feedforward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )
        # One projection a slot: with a shared one, slots took twice as many steps to say different things.
        self.output = nn.Parameter(
            torch.randn(config.latents, width, policy_width) * config.prefix.scale * embedding_rms
        )
        repeated = None if anchors is None else anchors[torch.arange(config.latents) % len(anchors)].clone()
        self.register_buffer("anchors", repeated)

    def calibrate(self, features: Sequence[Float[Tensor, "batch tokens width"]], ridge: float) -> None:
        """Starts the input projections of a fresh router from the experts' states on some training prompts."""
        for project, feature in zip(self.project, features, strict=True):
            assert isinstance(project, nn.Linear)
            states = feature.flatten(0, 1)
            whiten_input(project, states[states.ne(0).any(dim=-1)], ridge)

    def forward(
        self, features: Sequence[Float[Tensor, "batch tokens width"]], visible: Bool[Tensor, "batch experts"]
    ) -> RouterOutput:
        """Makes a prefix for every prompt.

        Args:
            features: one tensor an expert; experts may differ in tokens and width.  A state of zeros is padding.
            visible: False hides an expert; every row must show at least one.
        """
        states = [
            project(norm(feature)) + self.expert_embedding[index] + self._places(feature)
            for index, (norm, project, feature) in enumerate(zip(self.norms, self.project, features, strict=True))
        ]
        counts = [state.shape[1] for state in states]
        keys = torch.cat(states, dim=1)
        shown = torch.cat([visible[:, i : i + 1] & _real(feature) for i, feature in enumerate(features)], dim=1)
        batch, _, width = keys.shape
        by_head = (self.heads, width // self.heads)
        query = self.query(self.latents).unflatten(-1, by_head).transpose(-2, -3)  # the same for every prompt
        key, value = (project(keys).unflatten(-1, by_head).transpose(-2, -3) for project in (self.key, self.value))
        scores = query @ key.transpose(2, 3) / (width // self.heads) ** 0.5
        attention = scores.masked_fill(~shown[:, None, None, :], float("-inf")).softmax(dim=-1)
        mixed = (attention @ value).transpose(1, 2).reshape(batch, -1, width)
        prefix = self._prefix(self.latents + self.merge(mixed))
        per_expert = torch.stack([part.sum(dim=-1) for part in attention.split(counts, dim=-1)], dim=-1)
        return RouterOutput(prefix, per_expert)

    def _prefix(self, hidden: Float[Tensor, "batch latents hidden"]) -> Float[Tensor, "batch latents width"]:
        """Each slot's embedding from what its latent has gathered."""
        prefix = torch.einsum("blw,lwp->blp", hidden + self.feedforward(hidden), self.output)
        return prefix if self.anchors is None else prefix + self.anchors

    def _places(self, feature: Tensor) -> Tensor | float:
        """Marks states by how far they are from the prompt's end; a single state needs no mark."""
        tokens, width = feature.shape[1], self.expert_embedding.shape[1]
        if tokens == 1:
            return 0.0
        from_end = torch.arange(tokens - 1, -1, -1, device=feature.device, dtype=feature.dtype)
        rates = torch.logspace(0, -2, width // 2, device=feature.device, dtype=feature.dtype)
        angles = from_end[:, None] * rates
        return torch.cat([angles.sin(), angles.cos(), angles.new_zeros(tokens, width % 2)], dim=-1)


class StaticPrefix(Perceiver):
    """The same prefix for every prompt: a Perceiver whose latents gather nothing, with the same way to a prefix.

    What is left of a gain when the experts are left out.  Its attention is zero.
    """

    def __init__(
        self,
        config: RouterConfig,
        widths: Sequence[int],
        policy_width: int,
        embedding_rms: float,
        anchors: Float[Tensor, "anchors width"] | None = None,
    ) -> None:
        super().__init__(config, widths, policy_width, embedding_rms, anchors)
        # Only what makes the prefix stays, so that its size and its gradient are its own.
        for unused in ("norms", "project", "expert_embedding", "query", "key", "value", "merge"):
            delattr(self, unused)

    def calibrate(self, features: Sequence[Tensor], ridge: float) -> None:
        """There is nothing that reads states."""

    def forward(
        self, features: Sequence[Float[Tensor, "batch tokens width"]], visible: Bool[Tensor, "batch experts"]
    ) -> RouterOutput:
        """See `Perceiver.forward`; the features count for nothing."""
        batch, experts = visible.shape
        slots = len(self.latents)
        prefix = self._prefix(self.latents[None]).expand(batch, -1, -1)
        return RouterOutput(prefix, prefix.new_zeros(batch, 1, slots, experts))


ROUTERS: dict[str, type[nn.Module]] = {"perceiver": Perceiver, "static": StaticPrefix}


def _real(feature: Float[Tensor, "batch tokens width"]) -> Bool[Tensor, "batch tokens"]:
    """Which states are no padding; a prompt always has one."""
    if feature.shape[1] == 1:
        return torch.ones(feature.shape[:2], dtype=torch.bool, device=feature.device)
    return feature.ne(0).any(dim=-1)
