"""The policy engine on vLLM: one request a prompt, given wholly as embeddings, with all its samples."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from experts.adapter import adapter_arrays, write_adapter
from experts.architectures import check_policy
from experts.loading import FrozenModel
from experts.state import RouterSnapshot
from experts.stops import StopStrings, cut_at_stop
from experts.vllm_engine import Sample, VllmEngine
from rollout.config import PolicyConfig
from rollout.continuous import Decoding, Piece
from rollout.engine import Request, lay_out_requests
from rollout.sequence import PrefixPosition, Tokens, with_prefix
from rollout.types import Completion, FinishReason, Sampling

ADAPTERS_KEPT = 64  # versions on disk: more than requests under way may ask for


class VllmPolicyEngine:
    """Continuous batching over all requests in flight; any number of threads may call.

    The policy's weights never change, so vLLM runs unmodified and nothing is ever reloaded.

    Raises:
        ModelError: when the policy is of an architecture that vLLM would run wrongly.
    """

    needs_uniforms = False

    def __init__(
        self,
        policy: FrozenModel,
        config: PolicyConfig,
        position: PrefixPosition,
        threads: int = 0,
        on_death: Callable[[], None] | None = None,
        seed: int = 0,
    ) -> None:
        check_policy(policy.path, "vllm", bool(config.gpus))
        self.policy, self.position, self.lora = policy, position, config.lora
        self._adapters = Path(tempfile.mkdtemp(prefix="musketeers-adapters-")) if config.lora else Path()
        self._written: list[Path] = []
        self._writing = threading.Lock()
        rank = config.lora.rank if config.lora else None
        self.engine = VllmEngine(
            policy.path, config, "generate", threads=threads, on_death=on_death, seed=seed, adapter_rank=rank
        )

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        prefix: Float[Tensor, "batch slots width"] | None,
        sampling: Sampling,
        snapshot: RouterSnapshot | None = None,
    ) -> list[list[Completion]]:
        """See `PolicyEngine.generate`."""
        prompts = self.embeddings(requests, prefix)
        greedy = sampling.temperature == 0
        made = self.engine.generate(
            prompts,
            sampling.samples,
            sampling.temperature,
            sampling.max_new_tokens,
            self.policy.end_tokens,
            None if greedy else [request.seed for request in requests],
            self._adapter_file(snapshot),
            sampling.stop,
        )
        stops = StopStrings(self.policy.tokenizer, sampling.stop)
        return [self._completions([_up_to_stop(sample, stops) for sample in samples], stops) for samples in made]

    async def stream(
        self,
        tokens: Tokens,
        prefix: Float[Tensor, "slots width"] | None,
        decoding: Decoding,
        snapshot: RouterSnapshot | None = None,
    ) -> AsyncIterator[Piece]:
        """See `PolicyEngine.stream`."""
        slots = None if prefix is None else prefix[None]
        (prompt,) = self.embeddings([Request(np.asarray(tokens), None)], slots)
        made = self.engine.stream(
            prompt,
            decoding.samples,
            decoding.temperature,
            decoding.top_p,
            decoding.max_new_tokens,
            self.policy.end_tokens,
            decoding.seed,
            self._adapter_file(snapshot),
            decoding.stop,
        )
        stops = StopStrings(self.policy.tokenizer, decoding.stop)
        going = {sample: list[int]() for sample in range(decoding.samples)}
        async with contextlib.aclosing(made):
            async for sample, new, stopped in made:
                if sample not in going:
                    continue  # vLLM has not seen yet that it is over
                piece = _piece(sample, new, stopped, stops, going[sample])
                yield piece
                if piece.finish is not None:
                    del going[sample]
                if not going:
                    break

    @property
    def under_way(self) -> int:
        """See `PolicyEngine.under_way`."""
        return self.engine.under_way

    @property
    def streamed(self) -> int:
        """See `PolicyEngine.streamed`."""
        return self.engine.streamed

    def embeddings(
        self, requests: Sequence[Request], prefix: Float[Tensor, "batch slots width"] | None
    ) -> list[Tensor]:
        """(tokens, width) of every prompt with its prefix: the layout's unmasked columns."""
        slots = 0 if prefix is None else prefix.shape[1]
        batch = lay_out_requests(requests, slots, self.policy.pad_id, self.position)
        embedded = with_prefix(self.policy.embed(batch.tokens), prefix, batch)
        return [row[shown.bool()].contiguous() for row, shown in zip(embedded, batch.mask, strict=True)]

    def _adapter_file(self, snapshot: RouterSnapshot | None) -> Path | None:
        """The snapshot's adapter as a folder of its version, which vLLM loads once."""
        if self.lora is None or snapshot is None:
            return None
        with self._writing:
            folder = self._adapters / f"version-{snapshot.version}-{snapshot.checksum}"
            if not folder.is_dir():
                whole = folder.with_suffix(".unfinished")
                write_adapter(whole, adapter_arrays(snapshot.arrays), self.lora, self.policy.path)
                whole.rename(folder)
                self._written.append(folder)
                for old in self._written[:-ADAPTERS_KEPT]:
                    shutil.rmtree(old)
                del self._written[:-ADAPTERS_KEPT]
            return folder

    def sha256(self) -> str:
        """Hash of the weights that the engine holds now."""
        return self.engine.sha256()

    def close(self) -> None:
        """Ends the engine's processes."""
        self.engine.close()
        if self.lora is not None:
            shutil.rmtree(self._adapters, ignore_errors=True)

    def _completions(self, samples: Sequence[Sample], stops: StopStrings) -> list[Completion]:
        """Equal samples are one object, which saves everybody after this most of the work."""
        keys = [(*sample.tokens, *sample.logprobs) for sample in samples]
        distinct = list(dict(zip(keys, samples, strict=True)).items())
        ends = self.policy.end_tokens
        shown = [sample.tokens[: -1 if sample.tokens[-1] in ends else None] for _, sample in distinct]
        made = {
            key: Completion(
                tokens=np.array(sample.tokens, dtype=np.int64),
                logprobs=np.array(sample.logprobs, dtype=np.float32),
                text=cut_at_stop(text, stops.stops),
                finish=FinishReason.STOP if sample.stopped else FinishReason.LENGTH,
            )
            for (key, sample), text in zip(distinct, self.policy.tokenizer.batch_decode(shown), strict=True)
        }
        return [made[key] for key in keys]


def _up_to_stop(sample: Sample, stops: StopStrings) -> Sample:
    """A sample up to the token that completes a stop string.

    vLLM's own end may come later: it reads on where a token brings half a character.
    """
    length = stops.length(sample.tokens) if stops else None
    return sample if length is None else Sample(sample.tokens[:length], sample.logprobs[:length], True)


def _piece(sample: int, new: Sample, stopped: bool | None, stops: StopStrings, said: list[int]) -> Piece:
    """What is new of a sample, up to its end, and added to what it has said."""
    for count, token in enumerate(new.tokens, 1):
        said.append(token)
        if stops and stops.end(said):
            return Piece(sample, tuple(new.tokens[:count]), tuple(new.logprobs[:count]), FinishReason.STOP)
    finish = None if stopped is None else FinishReason.STOP if stopped else FinishReason.LENGTH
    return Piece(sample, tuple(new.tokens), tuple(new.logprobs), finish)
