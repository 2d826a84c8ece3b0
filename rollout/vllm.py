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
        )
        return [self._completions(samples) for samples in made]

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
        )
        async with contextlib.aclosing(made):
            async for sample, new, stopped in made:
                finish = None if stopped is None else FinishReason.STOP if stopped else FinishReason.LENGTH
                yield Piece(sample, tuple(new.tokens), tuple(new.logprobs), finish)

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

    def _completions(self, samples: Sequence[Sample]) -> list[Completion]:
        """Equal samples are one object, which saves everybody after this most of the work."""
        keys = [(*sample.tokens, *sample.logprobs) for sample in samples]
        distinct = list(dict(zip(keys, samples, strict=True)).items())
        shown = [sample.tokens[: -1 if sample.stopped else None] for _, sample in distinct]
        made = {
            key: Completion(
                tokens=np.array(sample.tokens, dtype=np.int64),
                logprobs=np.array(sample.logprobs, dtype=np.float32),
                text=text,
                finish=FinishReason.STOP if sample.stopped else FinishReason.LENGTH,
            )
            for (key, sample), text in zip(distinct, self.policy.tokenizer.batch_decode(shown), strict=True)
        }
        return [made[key] for key in keys]
