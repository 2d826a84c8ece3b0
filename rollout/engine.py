"""The policy engine on transformers: one prefill a prompt, and one row for all of its samples that agree so far.

The policy is frozen, so an engine never reloads weights: a sequence is always produced under
exactly one router version.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experts.adapter import adapter_arrays
from experts.architectures import policy_refusal
from experts.kv_cache import new_cache, select_rows
from experts.loading import FrozenModel, ModelError, weights_sha256
from experts.state import RouterSnapshot
from experts.stops import StopStrings, cut_at_stop
from rollout.continuous import ContinuousBatch, Decoding, Piece
from rollout.draws import draw_tokens
from rollout.sequence import PrefixPosition, PromptBatch, Tokens, lay_out_prompts, next_positions, with_prefix
from rollout.types import Completion, FinishReason, Sampling


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for the engine.

    tokens: the prompt's token ids.
    uniforms: (samples, max_new_tokens) float64 draws in [0, 1), one a sampled token; they make a
        completion independent of what else is in the batch.
    seed: for an engine that draws by itself.
    open: whether the prompt gets its prefix.
    """

    tokens: Tokens
    uniforms: np.ndarray | None
    seed: int = 0
    open: bool = True


class PolicyEngine(Protocol):
    """What a rollout worker needs of an engine.  needs_uniforms: whether requests must bring their draws."""

    needs_uniforms: bool

    def generate(
        self,
        requests: Sequence[Request],
        prefix: Float[Tensor, "batch slots width"] | None,
        sampling: Sampling,
        snapshot: RouterSnapshot | None = None,
    ) -> list[list[Completion]]:
        """`sampling.samples` completions for every request; no prefix means no slots at all.

        snapshot: whose adapter the policy is to have; None means the frozen policy.
        """
        ...

    def stream(
        self,
        tokens: Tokens,
        prefix: Float[Tensor, "slots width"] | None,
        decoding: Decoding,
        snapshot: RouterSnapshot | None = None,
    ) -> AsyncIterator[Piece]:
        """The samples of one request as they are made; a caller that stops listening ends them.

        snapshot: as in `generate`, the same for all requests at a time.
        """
        ...

    @property
    def under_way(self) -> int:
        """Samples, or requests, of streams that are being made."""
        ...

    @property
    def streamed(self) -> int:
        """Tokens sampled for streams so far."""
        ...

    def sha256(self) -> str:
        """Hash of the policy's weights as they are now."""
        ...

    def close(self) -> None:
        """Ends what runs outside this process."""
        ...


class TransformersEngine:
    """Batched sampling with a KV cache.

    Raises:
        ModelError: when the policy is of an architecture that would read a prefix wrongly.
    """

    needs_uniforms = True

    def __init__(self, policy: FrozenModel, position: PrefixPosition) -> None:
        if reason := policy_refusal(policy.model.config):
            raise ModelError(f"model {policy.path!r} cannot be the policy: {reason}")
        self.policy = policy
        self.position: PrefixPosition = position
        self._adapter = ""
        self._streams: ContinuousBatch | None = None

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        prefix: Float[Tensor, "batch slots width"] | None,
        sampling: Sampling,
        snapshot: RouterSnapshot | None = None,
    ) -> list[list[Completion]]:
        """See `PolicyEngine.generate`.  Temperature 0 takes the most likely token."""
        with self._adapted(snapshot):
            return self._generate(requests, prefix, sampling)

    def _adapted(self, snapshot: RouterSnapshot | None) -> contextlib.AbstractContextManager[None]:
        adapter = self.policy.adapter
        if adapter is None:
            return contextlib.nullcontext()
        if snapshot is None:
            return adapter.off()
        if snapshot.checksum != self._adapter:
            adapter.put(adapter_arrays(snapshot.arrays))
            self._adapter = snapshot.checksum
        return contextlib.nullcontext()

    def _generate(
        self, requests: Sequence[Request], prefix: Float[Tensor, "batch slots width"] | None, sampling: Sampling
    ) -> list[list[Completion]]:
        model, tokenizer, device = self.policy.model, self.policy.tokenizer, self.policy.device
        slots = 0 if prefix is None else prefix.shape[1]
        batch = lay_out_requests(requests, slots, self.policy.pad_id, self.position, device)
        embedded = with_prefix(self.policy.embed(batch.tokens), prefix, batch)
        cache = new_cache(model.config)
        out = model(
            **self.policy.inputs(batch.tokens, embedded),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, mask, uniforms = out.logits[:, -1], batch.mask, _stack_uniforms(requests, device)
        ends, stops = torch.tensor(self.policy.end_tokens, device=device), StopStrings(tokenizer, sampling.stop)
        # Samples that are not at their end yet, and each one's row in the cache.
        live = torch.arange(len(requests) * sampling.samples, device=device)
        rows = live // sampling.samples
        tokens = torch.zeros(len(live), sampling.max_new_tokens, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(live), sampling.max_new_tokens, device=device)
        completed = torch.zeros_like(tokens, dtype=torch.bool)  # by the text that ends there
        for step in range(sampling.max_new_tokens):
            draws = None if uniforms is None else uniforms[live, step]
            chosen, logprobs[live, step] = pick(logits, rows, sampling.temperature, draws)
            tokens[live, step] = chosen
            going = ~torch.isin(chosen, ends)
            if stops:
                completed[live, step] = _complete(stops, live, rows, tokens[:, : step + 1])
                going &= ~completed[live, step]
            live, rows, chosen = live[going], rows[going], chosen[going]
            if step + 1 == sampling.max_new_tokens or len(live) == 0:
                break
            # Samples of a prompt that have said the same so far go on as one row.
            # One number a pair: finding equal rows of a matrix is many times slower.
            distinct, rows = torch.unique(rows * logits.shape[-1] + chosen, return_inverse=True)
            parents, chosen = distinct // logits.shape[-1], distinct % logits.shape[-1]
            select_rows(cache, parents)
            mask = mask[parents]
            positions = next_positions(mask)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]
        said, logged, ended = (part[:, : step + 1].cpu().numpy() for part in (tokens, logprobs, completed))
        flat = self._completions(said, logged, ended, sampling.stop)
        return [flat[i : i + sampling.samples] for i in range(0, len(flat), sampling.samples)]

    def stream(
        self,
        tokens: Tokens,
        prefix: Float[Tensor, "slots width"] | None,
        decoding: Decoding,
        snapshot: RouterSnapshot | None = None,
    ) -> AsyncIterator[Piece]:
        """See `PolicyEngine.stream`."""
        if self._streams is None:
            self._streams = ContinuousBatch(self.policy, self.position)
        if snapshot is not None:
            self._adapted(snapshot)
        return self._streams.stream(tokens, prefix, decoding)

    @property
    def under_way(self) -> int:
        """See `PolicyEngine.under_way`."""
        return 0 if self._streams is None else self._streams.under_way

    @property
    def streamed(self) -> int:
        """See `PolicyEngine.streamed`."""
        return 0 if self._streams is None else self._streams.sampled

    def sha256(self) -> str:
        """See `PolicyEngine.sha256`."""
        return weights_sha256(self.policy.model)

    def close(self) -> None:
        """Ends the streams; nothing runs outside."""
        if self._streams is not None:
            self._streams.close()

    def _completions(
        self, tokens: np.ndarray, logprobs: np.ndarray, completed: np.ndarray, stop: Sequence[str]
    ) -> list[Completion]:
        """One a row; equal rows are one object, which saves everybody after this most of the work.

        completed: where a token completes a stop string.
        """
        ends = np.isin(tokens, self.policy.end_tokens)
        ended = ends | completed
        stopped = np.asarray(ended.any(axis=1))
        lengths = np.where(stopped, ended.argmax(axis=1) + 1, tokens.shape[1])
        keys = [(t[:n].tobytes(), p[:n].tobytes()) for t, p, n in zip(tokens, logprobs, lengths, strict=True)]
        rows = list({key: row for row, key in enumerate(keys)}.values())
        shown = [tokens[row, : lengths[row] - ends[row, lengths[row] - 1]] for row in rows]
        made = {
            keys[row]: Completion(
                tokens=tokens[row, : lengths[row]],
                logprobs=logprobs[row, : lengths[row]],
                text=cut_at_stop(text, stop),
                finish=FinishReason.STOP if stopped[row] else FinishReason.LENGTH,
            )
            for row, text in zip(rows, self.policy.tokenizer.batch_decode(shown), strict=True)
        }
        return [made[key] for key in keys]


def lay_out_requests(
    requests: Sequence[Request], slots: int, pad_id: int, position: PrefixPosition, device: torch.device | str = "cpu"
) -> PromptBatch:
    """See `lay_out_prompts`; requests without prefix have no slots."""
    shown = torch.tensor([request.open for request in requests])[:, None].expand(-1, slots)
    return lay_out_prompts([request.tokens for request in requests], slots, pad_id, position, shown, device)


def pick(
    logits: Float[Tensor, "rows vocabulary"],
    rows: Int[Tensor, " samples"],
    temperature: float,
    uniforms: Float[Tensor, " samples"] | None,
) -> tuple[Int[Tensor, " samples"], Float[Tensor, " samples"]]:
    """One token a sample and its log-probability under the distribution it was drawn from.

    Sampling inverts the cumulative distribution at the sample's own uniform draw: the draw decides, never the order
    of samples in the batch.

    Args:
        rows: each sample's row of `logits`.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        chosen = logprobs.argmax(dim=-1)[rows]
    else:
        if uniforms is None:
            raise ValueError("sampling at a temperature above 0 needs the requests' uniform draws")
        chosen = draw_tokens(logprobs, rows, uniforms)
    return chosen, logprobs[rows, chosen]


def _complete(
    stops: StopStrings, live: Int[Tensor, " live"], rows: Int[Tensor, " live"], tokens: Int[Tensor, "samples length"]
) -> Bool[Tensor, " live"]:
    """Which live samples' last token completes a stop string; samples of one row have said the same before it."""
    samples, last = live.tolist(), list(zip(rows.tolist(), tokens[live, -1].tolist(), strict=True))
    example = dict(zip(last, samples, strict=True))
    found = {way: stops.may_end(way[1]) and stops.end(tokens[at].tolist()) for way, at in example.items()}
    return torch.tensor([found[way] for way in last], device=live.device)


def _stack_uniforms(requests: Sequence[Request], device: torch.device) -> Tensor | None:
    rows = [request.uniforms for request in requests if request.uniforms is not None]
    if len(rows) != len(requests):
        return None
    return torch.from_numpy(np.concatenate(rows)).to(device)
