"""One frozen expert: reads each prompt once, hands out its hidden state, decodes nothing while training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import layer_norm

from experts.cache import FeatureCache
from experts.config import CacheConfig, ExpertConfig
from experts.loading import FrozenModel, load_frozen, weights_sha256

Messages = Sequence[Mapping[str, Any]]
ENGINE = "transformers"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One expert's features for some prompts, in their order.

    features: one (tokens, width) float32 array a prompt.
    hits, misses: of the feature cache, for these prompts.
    seconds: time spent encoding.
    """

    expert: str
    keys: tuple[str, ...]
    features: tuple[np.ndarray, ...]
    hits: int
    misses: int
    seconds: float


class Expert:
    """A frozen model behind a feature cache.

    An instance is used by one thread at a time, in a Ray actor or inline.
    """

    def __init__(self, config: ExpertConfig, path: str, cache: CacheConfig, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        device = "cuda" if config.gpus and torch.cuda.is_available() else "cpu"
        self.config = config
        self.frozen: FrozenModel = load_frozen(path, config.dtype, device, config.name)
        self.cache = FeatureCache(cache)
        self._fingerprint = self._feature_fingerprint()

    def __repr__(self) -> str:
        return f"Expert({self.config.name})"

    def ready(self) -> bool:
        """Answers once the worker is built."""
        return True

    def info(self) -> dict[str, Any]:
        """Name, width, parameters and fingerprints, for the router's metadata and the run's summary."""
        return {
            "name": self.config.name,
            "width": self.frozen.width,
            "parameters": self.frozen.parameters,
            "fingerprint": self._fingerprint,
            "sha256": self.sha256(),
        }

    def sha256(self) -> str:
        """Hash of the weights as they are now."""
        return weights_sha256(self.frozen.model)

    def encode(self, prompts: Sequence[Messages]) -> Encoded:
        """Features of some prompts, from the cache where it has them."""
        start = time.perf_counter()
        texts = [self.frozen.render(messages) for messages in prompts]
        keys = tuple(hashlib.sha256(f"{self._fingerprint}\n{text}".encode()).hexdigest() for text in texts)
        hits, misses = self.cache.hits, self.cache.misses
        found: dict[str, np.ndarray | None] = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        wanted = [index for key, index in {key: i for i, key in enumerate(keys)}.items() if found[key] is None]
        for at in range(0, len(wanted), self.config.batch):
            chunk = wanted[at : at + self.config.batch]
            for index, made in zip(chunk, self._forward([prompts[i] for i in chunk]), strict=True):
                self.cache.put(keys[index], made)
                found[keys[index]] = made
        features = tuple(feature for key in keys if (feature := found[key]) is not None)
        return Encoded(
            self.config.name,
            keys,
            features,
            self.cache.hits - hits,
            self.cache.misses - misses,
            time.perf_counter() - start,
        )

    def answer(self, prompts: Sequence[Messages], max_new_tokens: int) -> list[str]:
        """The expert's own greedy answers (a baseline; never part of training)."""
        answers: list[str] = []
        for at in range(0, len(prompts), self.config.batch):
            rows = [self._tokens(messages) for messages in prompts[at : at + self.config.batch]]
            tokens, mask = _pad(rows, self.frozen.pad_id, left=True)
            with torch.inference_mode():
                out = self.frozen.model.generate(
                    input_ids=tokens.to(self.frozen.device),
                    attention_mask=mask.to(self.frozen.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=list(self.frozen.end_tokens),
                    pad_token_id=self.frozen.pad_id,
                )
            new = out[:, tokens.shape[1] :].tolist()
            answers += [self.frozen.tokenizer.decode(_until(row, self.frozen.end_tokens)) for row in new]
        return answers

    def _tokens(self, messages: Messages) -> list[int]:
        return self.frozen.tokenize(messages)[-self.config.max_tokens :]

    def _forward(self, prompts: Sequence[Messages]) -> list[np.ndarray]:
        """(1, width) float32 features: the chosen layer's pooled state, layer-normalised without parameters."""
        tokens, mask = _pad([self._tokens(messages) for messages in prompts], self.frozen.pad_id, left=False)
        tokens, mask = tokens.to(self.frozen.device), mask.to(self.frozen.device)
        last = self.config.layer == -1
        with torch.inference_mode():
            out = self.frozen.model.base_model(
                input_ids=tokens, attention_mask=mask, use_cache=False, output_hidden_states=not last
            )
            states = out.last_hidden_state if last else out.hidden_states[self.config.layer]
            pooled = pool(states.float(), mask, self.config.pool)
            if self.config.norm == "layer":
                pooled = layer_norm(pooled, pooled.shape[-1:])
        return list(pooled.cpu().numpy()[:, None, :])

    def _feature_fingerprint(self) -> str:
        c = self.config
        parts = [self.frozen.fingerprint(), c.layer, c.pool, c.norm, c.dtype, c.max_tokens, ENGINE]
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


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


def _pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    tokens = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        tokens[index, place], mask[index, place] = row, 1
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)
