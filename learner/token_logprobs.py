"""Log-probabilities and entropies of tokens from hidden states, without a (tokens, vocabulary) tensor.

A model's own forward makes the logits, a chunk of tokens at a time, so that soft caps, scales and adapters of the
output layer are whatever its code says.  What backward needs of a chunk is d logprob / d hidden, as large as the
hidden states: it is computed while the chunk's logits are there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from experts.loading import FrozenModel, ModelError

CHUNK = 2**25  # logits at a time: 128 MiB a copy in float32, of which there are three
PerToken = Float[Tensor, "*tokens"]
Hidden = Float[Tensor, "tokens width"]
Logits = Float[Tensor, "tokens vocabulary"]


class TokenStatistics(NamedTuple):
    """logprobs: of tokens, with gradient; entropy: of each next-token distribution, without."""

    logprobs: PerToken
    entropy: PerToken


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of one module for the block; its hooks stay."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class Head:
    """What a causal language model does between its decoder's last hidden states and its logits.

    Raises:
        ModelError: for a model without a decoder of its own.
    """

    def __init__(self, policy: FrozenModel) -> None:
        self._name, self._model, self._decoder = policy.name, policy.model, _decoder(policy)
        inside = {id(parameter) for parameter in self._decoder.parameters()}
        self.trains = any(p.requires_grad and id(p) not in inside for p in self._model.parameters())
        self._output: type = dict

    def hidden_states(self, **inputs: Any) -> Float[Tensor, "rows tokens width"]:
        """The decoder's last ones in the model's own forward, which computes no logits.

        Raises:
            ModelError: when the model does not use its decoder.
        """
        forward, found = self._decoder.forward, []

        def recording(*args: Any, **kwargs: Any) -> Any:
            found.append(forward(*args, **kwargs))
            return found[-1]

        none = torch.empty(0, dtype=torch.long, device=self._model.device)
        with replaced_forward(self._decoder, recording):
            self._model(**inputs, logits_to_keep=none)
        if len(found) != 1:
            raise ModelError(
                f"model {self._name!r}: {type(self._model).__name__} does not use its decoder as others do"
            )
        self._output = type(found[0])
        return found[0].last_hidden_state

    def __call__(self, hidden: Hidden) -> Logits:
        """The model's logits, in its own dtype; after `hidden_states`."""
        output = self._output(last_hidden_state=hidden[None])
        with replaced_forward(self._decoder, lambda *_args, **_kwargs: output):
            return self._model(inputs_embeds=hidden[None], use_cache=False).logits.squeeze(0)


def _decoder(policy: FrozenModel) -> Any:
    from transformers import PreTrainedModel

    model = policy.model
    inner = [m for m in (model.get_decoder(), *model.modules()) if m is not model and isinstance(m, PreTrainedModel)]
    if not inner:
        raise ModelError(f"model {policy.name!r}: a {type(model).__name__} keeps its hidden states to itself")
    return inner[0]


def token_statistics(
    head: Callable[[Hidden], Logits],
    hidden: Hidden,
    tokens: Int[Tensor, " tokens"],
    temperature: float,
    chunk: int,
    head_trains: bool = False,
) -> TokenStatistics:
    """Log-probabilities at a temperature; half precision is raised to float32 first.

    Args:
        head: each token's logits from its own hidden states alone.
        chunk: tokens at a time.
        head_trains: whether its parameters get gradients too; the chunks' logits are then computed twice.
    """
    if not head_trains:
        return TokenStatistics(*_Statistics.apply(hidden, head, tokens, temperature, chunk))
    parts = []
    for some, theirs in zip(hidden.split(chunk), tokens.split(chunk), strict=True):
        parts.append(checkpoint(_plain, head, some, theirs, temperature, use_reentrant=False))
    logprobs, entropy = zip(*parts, strict=True)
    return TokenStatistics(torch.cat(logprobs), torch.cat(entropy))


def _plain(head: Callable[[Hidden], Logits], hidden: Hidden, tokens: Tensor, temperature: float) -> TokenStatistics:
    logprobs = _log_softmax(head(hidden), temperature)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return TokenStatistics(logprobs.gather(1, tokens[:, None])[:, 0], entropy)


def _log_softmax(logits: Logits, temperature: float) -> Logits:
    raised = logits if logits.dtype == torch.float64 else logits.float()
    return (raised if temperature == 1 else raised / temperature).log_softmax(dim=-1)


class _Statistics(torch.autograd.Function):
    """Keeps d logprob / d hidden of each token, (tokens, width), and nothing of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Hidden,
        head: Callable[[Hidden], Logits],
        tokens: Int[Tensor, " tokens"],
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        learns, parts = ctx.needs_input_grad[0], []
        slopes = torch.empty_like(hidden) if learns else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            some = hidden[rows].detach()
            logprobs, entropy, slope = _with_slope(head, some, tokens[rows, None], temperature, learns)
            parts.append((logprobs, entropy))
            if slopes is not None and slope is not None:
                slopes[rows] = slope
        if slopes is not None:
            ctx.save_for_backward(slopes)
        logprobs, entropy = map(torch.cat, zip(*parts, strict=True))
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0][:, None]).to(slopes.dtype), None, None, None, None


def _with_slope(
    head: Callable[[Hidden], Logits], hidden: Hidden, tokens: Int[Tensor, "tokens 1"], temperature: float, learns: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A chunk's log-probabilities and entropies, and d logprob / d hidden where it is wanted."""
    with torch.set_grad_enabled(learns):
        logits = head(hidden.requires_grad_(learns))
    log = _log_softmax(logits.detach(), temperature)
    p = log.exp()
    # einsum, for `vecdot` makes their product, which is a copy more.
    logprobs, entropy = log.gather(1, tokens)[:, 0], -torch.einsum("tv,tv->t", p, log)
    if not learns:
        return logprobs, entropy, None
    del log
    # d logprob / d logits = (one-hot - p) / temperature, in the place of p.
    slope = p.div_(-temperature).scatter_add_(1, tokens, torch.full_like(p[:, :1], 1 / temperature))
    return logprobs, entropy, torch.autograd.grad(logits, hidden, slope.to(logits.dtype))[0]
