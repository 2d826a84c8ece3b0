"""The policy engine on vLLM: one request a prompt, given wholly as embeddings, with all its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from experts.config import EngineConfig
from experts.loading import FrozenModel
from experts.vllm_engine import Sample, VllmEngine
from rollout.engine import Request
from rollout.sequence import PrefixPosition, lay_out_prompts, with_prefix
from rollout.types import Completion, FinishReason, Sampling


class VllmPolicyEngine:
    """Continuous batching over all requests in flight; any number of threads may call.

    The policy's weights never change, so vLLM runs unmodified and nothing is ever reloaded.
    """

    needs_uniforms = False

    def __init__(
        self,
        policy: FrozenModel,
        config: EngineConfig,
        position: PrefixPosition,
        threads: int = 0,
        on_death: Callable[[], None] | None = None,
        seed: int = 0,
    ) -> None:
        self.policy, self.position = policy, position
        self.engine = VllmEngine(policy.path, config, "generate", threads=threads, on_death=on_death, seed=seed)

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], prefix: Float[Tensor, "batch slots width"] | None, sampling: Sampling
    ) -> list[list[Completion]]:
        """See `PolicyEngine.generate`."""
        prompts = self.embeddings([request.tokens for request in requests], prefix)
        greedy = sampling.temperature == 0
        made = self.engine.generate(
            prompts,
            sampling.samples,
            sampling.temperature,
            sampling.max_new_tokens,
            self.policy.end_tokens,
            None if greedy else [request.seed for request in requests],
        )
        return [self._completions(samples) for samples in made]

    def embeddings(
        self, prompts: Sequence[Sequence[int] | np.ndarray], prefix: Float[Tensor, "batch slots width"] | None
    ) -> list[Tensor]:
        """(tokens, width) of every prompt with its prefix: the layout's unmasked columns."""
        slots = 0 if prefix is None else prefix.shape[1]
        batch = lay_out_prompts(prompts, slots, self.policy.pad_id, self.position)
        embedded = with_prefix(self.policy.embed(batch.tokens), prefix, batch)
        return [row[shown.bool()].contiguous() for row, shown in zip(embedded, batch.mask, strict=True)]

    def sha256(self) -> str:
        """Hash of the weights that the engine holds now."""
        return self.engine.sha256()

    def close(self) -> None:
        """Ends the engine's processes."""
        self.engine.close()

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
