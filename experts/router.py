"""The Perceiver router: hidden states of frozen experts in, a soft prefix for a frozen policy out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from experts.calibration import whiten_input
from experts.config import RouterConfig
from experts.plugins import load_plugin


class RouterOutput(NamedTuple):
    """What a router makes of a batch.

    prefix: (batch, latents, policy width).
    attention: (batch, heads, latents, experts), 1 in sum over experts, less where there is a null expert.
    options: (batch, options) log-probabilities of the choice it takes for each prompt, if it takes any.
    """

    prefix: Float[Tensor, "batch latents width"]
    attention: Float[Tensor, "batch heads latents experts"]
    options: Float[Tensor, "batch options"] | None = None


Asks = Literal["states", "answers", "nothing"]
Pick = Callable[[Float[Tensor, "batch options"]], Int[Tensor, " batch"]]
CLOSED_AT_FIRST = -2.0  # log-odds against no prefix at all: an eighth of the prompts try it


class Chooser(nn.Module):
    """Logits of a router's options: a sum over the experts' mean states, each read by a layer of its own."""

    def __init__(self, experts: int, width: int, options: int, gate: bool) -> None:
        super().__init__()
        # Every choice alike at first, but a gate open: it is there to be closed where that helps.
        layers = [nn.Linear(width, options, bias=False) for _ in range(experts)]
        for layer in layers:
            nn.init.zeros_(layer.weight)
        self.read = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), layer) for layer in layers)
        self.bias = nn.Parameter(torch.zeros(options))
        if gate:
            nn.init.constant_(self.bias[-1:], CLOSED_AT_FIRST)

    def forward(
        self, means: Sequence[Float[Tensor, "batch width"]], visible: Bool[Tensor, "batch experts"]
    ) -> Float[Tensor, "batch options"]:
        """Logits; a hidden expert adds nothing to them."""
        said = torch.stack([read(mean) for read, mean in zip(self.read, means, strict=True)])
        return self.bias + (said * visible.T.unsqueeze(-1)).sum(dim=0)


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

    asks: ClassVar[Asks] = "states"  # of the experts about every prompt
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
        marks = torch.randn(len(widths), width)
        self.expert_embedding = nn.ParameterList([nn.Parameter(mark.clone()) for mark in marks])
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
        self.null = nn.Parameter(torch.randn(width)) if config.null_expert else None
        self.gate = bool(config.gate)
        options = self.options(len(widths), config)
        self.choose = Chooser(len(widths), width, options, self.gate) if options > 1 else None
        repeated = None if anchors is None else anchors[torch.arange(config.latents) % len(anchors)].clone()
        self.register_buffer("anchors", repeated)

    def calibrate(
        self, features: Sequence[Float[Tensor, "batch tokens width"]], ridge: float, only: Sequence[int] | None = None
    ) -> None:
        """Starts fresh input projections, or only some, from the experts' states on some training prompts."""
        for index, (project, feature) in enumerate(zip(self.project, features, strict=True)):
            assert isinstance(project, nn.Linear)
            if only is None or index in only:
                states = feature.flatten(0, 1)
                whiten_input(project, states[states.ne(0).any(dim=-1)], ridge)

    @staticmethod
    def options(experts: int, config: RouterConfig) -> int:
        """How many choices there are for a prompt: what `shown` is for each, and last, with a gate, no prefix."""
        return 1 + bool(config.gate)

    def shown(self, visible: Bool[Tensor, "batch experts"], choice: Int[Tensor, " batch"]) -> Bool[Tensor, "batch e"]:
        """The experts that a choice shows."""
        return visible

    def forward(
        self,
        features: Sequence[Float[Tensor, "batch tokens width"]],
        visible: Bool[Tensor, "batch experts"],
        pick: Pick | None = None,
    ) -> RouterOutput:
        """Makes a prefix for every prompt.

        Args:
            features: one tensor an expert; experts may differ in tokens and width.  A state of zeros is padding.
            visible: False hides an expert; every row must show at least one.
            pick: takes (batch, options) log-probabilities to the (batch,) choice, for a router that has one; None
                takes the most likely.
        """
        states = self.states(features)
        options = None
        if self.choose is not None:
            options = self._options(features, states, visible)
            visible = self.shown(visible, options.detach().argmax(dim=-1) if pick is None else pick(options.detach()))
        counts = [state.shape[1] for state in states]
        shown = torch.cat([visible[:, i : i + 1] & real_states(feature) for i, feature in enumerate(features)], dim=1)
        if self.null is not None:
            states = [*states, self.null.expand(len(shown), 1, -1)]
            shown = torch.cat([shown, shown.new_ones(len(shown), 1)], dim=1)
        keys = torch.cat(states, dim=1)
        attention = self.scores(keys).masked_fill(~shown[:, None, None, :], float("-inf")).softmax(dim=-1)
        mixed = (attention @ self.by_head(self.value(keys))).transpose(1, 2).flatten(2)
        prefix = self._prefix(self.latents + self.merge(mixed))
        of_experts = attention[..., : sum(counts)].split(counts, dim=-1)
        per_expert = torch.stack([part.sum(dim=-1) for part in of_experts], dim=-1)
        return RouterOutput(prefix, per_expert, options)

    def states(self, features: Sequence[Float[Tensor, "batch tokens width"]]) -> list[Float[Tensor, "batch tokens w"]]:
        """Every expert's states in the shared width, marked as its own."""
        return [
            project(norm(feature)) + self.expert_embedding[index] + self._places(feature)
            for index, (norm, project, feature) in enumerate(zip(self.norms, self.project, features, strict=True))
        ]

    def scores(self, states: Float[Tensor, "batch keys width"]) -> Float[Tensor, "batch heads latents keys"]:
        """How much every latent wants of every state, before the softmax."""
        query = self.by_head(self.query(self.latents))  # the same for every prompt
        return query @ self.by_head(self.key(states)).transpose(-2, -1) / query.shape[-1] ** 0.5

    def by_head(self, rows: Float[Tensor, "*batch rows width"]) -> Float[Tensor, "*batch heads rows part"]:
        """Each head's part of the shared width."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def _options(
        self, features: Sequence[Tensor], states: Sequence[Tensor], visible: Bool[Tensor, "batch experts"]
    ) -> Float[Tensor, "batch options"]:
        """Log-probabilities, from the mean state of every expert that is visible."""
        means = []
        for index, (feature, state) in enumerate(zip(features, states, strict=True)):
            real = (real_states(feature) & visible[:, index : index + 1]).unsqueeze(-1).to(state.dtype)
            means.append((state * real).sum(dim=1) / real.sum(dim=1).clamp_min(1))
        assert self.choose is not None
        return self._allowed(self.choose(means, visible), visible).log_softmax(dim=-1)

    def _allowed(self, logits: Tensor, visible: Bool[Tensor, "batch experts"]) -> Tensor:
        return logits

    def _prefix(self, hidden: Float[Tensor, "batch latents hidden"]) -> Float[Tensor, "batch latents width"]:
        """Each slot's embedding from what its latent has gathered."""
        prefix = torch.einsum("blw,lwp->blp", hidden + self.feedforward(hidden), self.output)
        return prefix if self.anchors is None else prefix + self.anchors

    def _places(self, feature: Tensor) -> Tensor | float:
        """Marks states by how far they are from the prompt's end; a single state needs no mark."""
        tokens, width = feature.shape[1], self.latents.shape[1]
        if tokens == 1:
            return 0.0
        from_end = torch.arange(tokens - 1, -1, -1, device=feature.device, dtype=feature.dtype)
        rates = torch.logspace(0, -2, width // 2, device=feature.device, dtype=feature.dtype)
        angles = from_end[:, None] * rates
        return torch.cat([angles.sin(), angles.cos(), angles.new_zeros(tokens, width % 2)], dim=-1)


class Top1(Perceiver):
    """Hard routing: the Perceiver is shown the states of one expert, which it has chosen.

    The choice is an action: sampled in training, the most likely one else, and trained by its own policy gradient
    (`learner.choices`), because no gradient of the prefix reaches it.
    """

    @staticmethod
    def options(experts: int, config: RouterConfig) -> int:
        """An expert each, and last, with a gate, no prefix."""
        return experts + bool(config.gate)

    def shown(self, visible: Bool[Tensor, "batch experts"], choice: Int[Tensor, " batch"]) -> Bool[Tensor, "batch e"]:
        """The chosen expert; of a closed gate all that are visible, which counts for nothing."""
        experts = torch.arange(visible.shape[1], device=visible.device)
        return torch.where((choice < len(experts))[:, None], experts == choice[:, None], visible)

    def _allowed(self, logits: Tensor, visible: Bool[Tensor, "batch experts"]) -> Tensor:
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        hidden[:, : visible.shape[1]] = ~visible
        return logits.masked_fill(hidden, float("-inf"))


class StaticPrefix(Perceiver):
    """The same prefix for every prompt: a Perceiver whose latents gather nothing, with the same way to a prefix.

    What is left of a gain when the experts are left out.  Its attention is zero.
    """

    asks = "nothing"

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
        for unused in ("norms", "project", "expert_embedding", "query", "key", "value", "merge", "null", "choose"):
            delattr(self, unused)

    def calibrate(self, features: Sequence[Tensor], ridge: float, only: Sequence[int] | None = None) -> None:
        """There is nothing that reads states."""

    def forward(
        self,
        features: Sequence[Float[Tensor, "batch tokens width"]],
        visible: Bool[Tensor, "batch experts"],
        pick: Pick | None = None,
    ) -> RouterOutput:
        """See `Perceiver.forward`; the features count for nothing."""
        batch, experts = visible.shape
        slots = len(self.latents)
        prefix = self._prefix(self.latents[None]).expand(batch, -1, -1)
        return RouterOutput(prefix, prefix.new_zeros(batch, 1, slots, experts))


class NoPrefix(nn.Module):
    """No slots at all: what is left is the policy, alone or with an adapter of its own.  Its attention is zero."""

    asks: ClassVar[Asks] = "nothing"

    def __init__(
        self,
        config: RouterConfig,
        widths: Sequence[int],
        policy_width: int,
        embedding_rms: float,
        anchors: Float[Tensor, "anchors width"] | None = None,
    ) -> None:
        super().__init__()
        self.policy_width = policy_width

    def forward(
        self,
        features: Sequence[Float[Tensor, "batch tokens width"]],
        visible: Bool[Tensor, "batch experts"],
        pick: Pick | None = None,
    ) -> RouterOutput:
        """See `Perceiver.forward`."""
        batch, experts = visible.shape
        nothing = torch.zeros(batch, 0, self.policy_width, device=visible.device)
        return RouterOutput(nothing, nothing.new_zeros(batch, 1, 1, experts))


class TextOnly(NoPrefix):
    """Output-level collaboration: the experts' answers are in the policy's prompt (`rollout.text`)."""

    asks = "answers"


ROUTERS: dict[str, type[nn.Module]] = {
    "perceiver": Perceiver,
    "top1": Top1,
    "static": StaticPrefix,
    "none": NoPrefix,
    "text": TextOnly,
}


def chooses(router: nn.Module) -> bool:
    """Whether a router takes a choice for every prompt, and so wants a `pick`."""
    return getattr(router, "choose", None) is not None


def closed_choice(router: nn.Module, options: Float[Tensor, "batch options"]) -> int:
    """The choice that means no prefix: the last one of a router with a gate; -1 where none does."""
    return options.shape[1] - 1 if getattr(router, "gate", False) else -1


def router_class(kind: str) -> type[nn.Module]:
    """The class of a `router.kind`.

    Raises:
        PluginError: when it is neither known nor leads anywhere.
    """
    return ROUTERS.get(kind) or load_plugin(kind, "router.kind", ROUTERS)


def real_states(feature: Float[Tensor, "batch tokens width"]) -> Bool[Tensor, "batch tokens"]:
    """Which states are no padding; a prompt always has one."""
    if feature.shape[1] == 1:
        return torch.ones(feature.shape[:2], dtype=torch.bool, device=feature.device)
    return feature.ne(0).any(dim=-1)
