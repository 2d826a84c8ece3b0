"""What makes an expert's hidden states: transformers in this process, or a vLLM engine beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from experts.architectures import check_expert
from experts.config import ExpertConfig
from experts.loading import FrozenModel, ModelError, load_embeddings, load_frozen, weights_sha256
from experts.vllm_engine import VllmEngine

Tokens = Sequence[int]
# Models whose state takes in what stands in front of a prompt, masked or not.
READS_PADDING = ("recurrent_gemma", "rwkv")


class Encoder(Protocol):
    """A frozen model that reads token ids.  `frozen` has its tokenizer, and its weights where they are here."""

    frozen: FrozenModel

    def states(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        """(tokens, width) float32 pooled states of each prompt."""
        ...

    def answer(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        """Greedy answers, as token ids."""
        ...

    def prepare(self, answers: bool) -> None:
        """Gets ready to answer, or to give states again."""
        ...

    def sha256(self) -> str:
        """Hash of the weights as they are now."""
        ...

    def close(self) -> None:
        """Ends what runs outside this process."""
        ...


def build_encoder(config: ExpertConfig, path: str, threads: int, on_death: Callable[[], None]) -> Encoder:
    """The encoder of the configured engine."""
    if config.engine == "vllm":
        return VllmEncoder(config, path, threads, on_death)
    return TransformersEncoder(config, path)


class TransformersEncoder:
    """Any layer of any model, a batch at a time."""

    def __init__(self, config: ExpertConfig, path: str) -> None:
        device = "cuda" if config.gpus and torch.cuda.is_available() else "cpu"
        self.config = config
        self.frozen = load_frozen(path, config.dtype, device, config.name, untrained=config.weights == "random")

    def states(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        """See `Encoder`."""
        tokens, mask = pad(prompts, self.frozen.pad_id, left=False)
        tokens, mask = tokens.to(self.frozen.device), mask.to(self.frozen.device)
        last = self.config.layer == -1
        with torch.inference_mode():
            cache = {} if self.frozen.is_encoder else {"use_cache": False}
            out = self.frozen.body(input_ids=tokens, attention_mask=mask, output_hidden_states=not last, **cache)
            states = (out.last_hidden_state if last else out.hidden_states[self.config.layer]).float()
            if states.ndim != 3:  # Gemma 3n has several streams between its first layer and its last
                raise ModelError(f"expert {self.config.name!r}: layer {self.config.layer} has several states a token")
            if self.config.pool == "last_k":
                lengths = mask.sum(dim=1).tolist()
                return [
                    row[max(0, length - self.config.last_k) : length].cpu().numpy()
                    for row, length in zip(states, lengths, strict=True)
                ]
            return list(pool(states, mask, self.config.pool).cpu().numpy()[:, None, :])

    def answer(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        """See `Encoder`."""
        if self.frozen.is_encoder:
            raise ModelError(f"expert {self.config.name!r} is an encoder, which reads and cannot answer")
        if self.frozen.model.config.model_type in READS_PADDING and len(prompts) > 1:
            return [self.answer([prompt], max_new_tokens)[0] for prompt in prompts]
        tokens, mask = pad(prompts, self.frozen.pad_id, left=True)
        with torch.inference_mode():
            out = self.frozen.model.generate(
                input_ids=tokens.to(self.frozen.device),
                attention_mask=mask.to(self.frozen.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=list(self.frozen.end_tokens),
                pad_token_id=self.frozen.pad_id,
            )
        return out[:, tokens.shape[1] :].tolist()

    def prepare(self, answers: bool) -> None:
        """The same model does both."""

    def sha256(self) -> str:
        """See `Encoder`."""
        return weights_sha256(self.frozen.model)

    def close(self) -> None:
        """Nothing runs outside."""


class VllmEncoder:
    """The last layer, by vLLM's pooling runner.

    An engine either gives states or answers: for the baselines, which ask for answers, the one makes room for the
    other and comes back with the next prompts.

    Raises:
        ModelError: when the expert is of an architecture that vLLM would run wrongly.
    """

    def __init__(self, config: ExpertConfig, path: str, threads: int, on_death: Callable[[], None]) -> None:
        check_expert(path, "vllm", bool(config.gpus))
        self.config, self.path, self.threads, self.on_death = config, path, threads, on_death
        self.frozen = load_embeddings(path, config.dtype, config.name)
        self._engine = self._pooling()

    def states(self, prompts: Sequence[Tokens]) -> list[np.ndarray]:
        """See `Encoder`."""
        self.prepare(answers=False)
        states = self._engine.states(prompts)
        return [state[-self.config.last_k :] for state in states] if self.config.pool == "last_k" else states

    def answer(self, prompts: Sequence[Tokens], max_new_tokens: int) -> list[list[int]]:
        """See `Encoder`."""
        self.prepare(answers=True)
        answers = self._engine.generate(prompts, 1, 0.0, max_new_tokens, self.frozen.end_tokens, None)
        return [answer[0].tokens for answer in answers]

    def sha256(self) -> str:
        """See `Encoder`."""
        self.prepare(answers=False)
        return self._engine.sha256()

    def close(self) -> None:
        """Ends the engine."""
        self._engine.close()

    def prepare(self, answers: bool) -> None:
        """See `Encoder`."""
        if self._engine.pooling_only != answers:
            return
        self._engine.close()
        self._engine = self._generating() if answers else self._pooling()

    def _pooling(self) -> VllmEngine:
        how = "all" if self.config.pool == "last_k" else self.config.pool
        return VllmEngine(self.path, self.config, "pooling", how, self.threads, self.on_death)

    def _generating(self) -> VllmEngine:
        return VllmEngine(
            self.path, self.config, "generate", threads=self.threads, on_death=self.on_death, embeds=False
        )


def pool(
    states: Float[Tensor, "batch tokens width"], mask: Int[Tensor, "batch tokens"], how: str
) -> Float[Tensor, "batch width"]:
    """One state a prompt, out of right-padded states."""
    if how == "first":
        return states[:, 0]
    if how == "mean":
        weight = mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(dim=1) / weight.sum(dim=1)
    return states[torch.arange(len(states)), mask.sum(dim=1) - 1]


def pad(rows: Sequence[Tokens], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask of one length."""
    longest = max(len(row) for row in rows)
    tokens = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        tokens[index, place], mask[index, place] = row, 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)
