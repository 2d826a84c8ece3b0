"""One frozen expert: reads each prompt once, hands out its hidden state, decodes nothing while training."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import layer_norm

from experts.cache import FeatureCache
from experts.chat import ChatSettings, Messages, PromptStyle, Reading, worded
from experts.config import CacheConfig, ExpertConfig
from experts.encoder import Encoder, build_encoder
from experts.selfcheck import Finding, check_expert, check_tokenizer, require
from experts.stops import cut_at_stop


@dataclass(frozen=True, slots=True)
class Encoded:
    """One expert's features for some prompts, in their order.

    features: one (tokens, width) float32 array a prompt.
    rows: the prompts' places among those that were asked for: several copies of an expert share the work.
    hits, misses: of the feature cache, for these prompts.
    seconds: time spent encoding.
    answers: the expert's own, instead of features, where these were asked for.
    operations, cold: floating-point operations of it, and what they would be without a cache (estimated, 2 for every
        parameter and token).
    cut: number of prompts whose middle was left out, because they have more than `max_tokens` tokens.
    """

    expert: str
    keys: tuple[str, ...]
    features: tuple[np.ndarray, ...]
    hits: int
    misses: int
    seconds: float
    rows: tuple[int, ...]
    answers: tuple[str, ...] = ()
    operations: float = 0.0
    cold: float = 0.0
    cut: int = 0


def whole(parts: Sequence[Encoded]) -> list[Encoded]:
    """The parts of every expert's copies put together, experts in the order of their first part.

    Raises:
        ValueError: when a prompt is missing or there twice.
    """
    by_expert: dict[str, list[Encoded]] = {}
    for part in parts:
        by_expert.setdefault(part.expert, []).append(part)
    return [mine[0] if len(mine) == 1 and _ordered(mine[0]) else _joined(mine) for mine in by_expert.values()]


def _ordered(part: Encoded) -> bool:
    return part.rows == tuple(range(len(part.rows)))


def _joined(parts: Sequence[Encoded]) -> Encoded:
    placed = {row: (part, index) for part in parts for index, row in enumerate(part.rows)}
    if sorted(placed) != list(range(sum(len(part.rows) for part in parts))):
        raise ValueError(f"expert {parts[0].expert}: the parts of its copies are not one whole")
    rows = [placed[row] for row in range(len(placed))]
    answered = bool(parts[0].answers)
    return Encoded(
        parts[0].expert,
        () if answered else tuple(part.keys[index] for part, index in rows),
        () if answered else tuple(part.features[index] for part, index in rows),
        sum(part.hits for part in parts),
        sum(part.misses for part in parts),
        max(part.seconds for part in parts),
        tuple(range(len(rows))),
        tuple(part.answers[index] for part, index in rows) if answered else (),
        sum(part.operations for part in parts),
        sum(part.cold for part in parts),
        sum(part.cut for part in parts),
    )


class Expert:
    """A frozen model behind a feature cache.

    An instance is used by one thread at a time, in a Ray actor or inline.
    """

    def __init__(
        self,
        config: ExpertConfig,
        path: str,
        cache: CacheConfig,
        threads: int = 0,
        style: PromptStyle = PromptStyle(),  # noqa: B008 - frozen
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.config, self.style = config, style
        self.encoder: Encoder = build_encoder(config, path, threads, self.engine_died)
        settings = ChatSettings(config.chat_template_kwargs, style.date)
        self.frozen = replace(self.encoder.frozen, chat_settings=settings)
        self.cache = FeatureCache(cache)
        self._fingerprint = self._feature_fingerprint()
        self._cache_key = f"{self._fingerprint}|{config.dtype}|{config.engine}"
        if config.self_check:
            with contextlib.ExitStack() as built:
                built.callback(self.close)
                require(self.self_check(), path, f"expert {config.name!r}")
                built.pop_all()

    def __repr__(self) -> str:
        return f"Expert({self.config.name})"

    def engine_died(self) -> None:
        """Called when an engine in a process of its own is gone; calls to the expert fail from then on."""

    def ready(self) -> bool:
        """Answers once the worker is built."""
        return True

    def close(self) -> None:
        """Ends the engine."""
        self.encoder.close()

    def self_check(self) -> list[Finding]:
        """See `experts.selfcheck`."""
        found = check_tokenizer(self.frozen)
        return [*found, *check_expert(self.encoder, self.config, lambda messages: self.read(messages).tokens)]

    def info(self) -> dict[str, Any]:
        """Name, width, parameters and fingerprints, for the router's metadata and the run's summary."""
        return {
            "name": self.config.name,
            "width": self.encoder.states([[self.frozen.pad_id]])[0].shape[-1],
            "parameters": self.frozen.parameters,
            "fingerprint": self._fingerprint,
            "date": self.frozen.chat.date,
            "sha256": self.sha256(),
            "answers": not self.frozen.is_encoder,
        }

    @property
    def fingerprint(self) -> str:
        """What a router is trained for: the model, and how its states are made."""
        return self._fingerprint

    def sha256(self) -> str:
        """Hash of the weights as they are now."""
        return self.encoder.sha256()

    def encode(self, prompts: Sequence[Messages], rows: Sequence[int] | None = None, keep: bool = True) -> Encoded:
        """Features of some prompts, from the cache where it has them.

        rows: see `Encoded`; None means all that were asked for.
        keep: whether the cache takes those that it did not have.  What a prompt stands beside in a batch changes its
            features' last digits, so what is asked in some runs only (measuring baselines) must not reach training.
        """
        start = time.perf_counter()
        readings = [self.read(messages) for messages in prompts]
        keys = tuple(hashlib.sha256(f"{self._cache_key}\n{each.key}".encode()).hexdigest() for each in readings)
        hits, misses = self.cache.hits, self.cache.misses
        found: dict[str, np.ndarray | None] = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        wanted = [index for key, index in {key: i for i, key in enumerate(keys)}.items() if found[key] is None]
        for at in range(0, len(wanted), self.config.batch):
            chunk = wanted[at : at + self.config.batch]
            for index, made in zip(chunk, self._forward([readings[i].tokens for i in chunk]), strict=True):
                if keep:
                    self.cache.put(keys[index], made)
                found[keys[index]] = made
        features = tuple(feature for key in keys if (feature := found[key]) is not None)
        a_token = 2.0 * self.frozen.parameters
        return Encoded(
            self.config.name,
            keys,
            features,
            self.cache.hits - hits,
            self.cache.misses - misses,
            time.perf_counter() - start,
            tuple(range(len(keys)) if rows is None else rows),
            operations=a_token * sum(len(readings[i].tokens) for i in wanted),
            cold=a_token * sum(len(each.tokens) for each in readings),
            cut=sum(each.cut for each in readings),
        )

    def prepare(self, answers: bool) -> None:
        """Gets ready for calls of `answer`, or of `encode` again; without it the first such call does."""
        self.encoder.prepare(answers)

    def answers(self, prompts: Sequence[Messages], rows: Sequence[int], max_new_tokens: int) -> Encoded:
        """The expert's own greedy answers, in place of features."""
        start = time.perf_counter()
        said = tuple(self.answer(prompts, max_new_tokens))
        readings = [self.read(messages) for messages in prompts]
        tokens = sum(len(each.tokens) for each in readings)
        tokens += sum(len(self.frozen.chat.text_tokens(text)) + 1 for text in said)
        spent = 2.0 * self.frozen.parameters * tokens
        seconds = time.perf_counter() - start
        cut = sum(each.cut for each in readings)
        return Encoded(self.config.name, (), (), 0, 0, seconds, tuple(rows), said, spent, spent, cut)

    def answer(self, prompts: Sequence[Messages], max_new_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """The expert's own greedy answers, as texts, each up to the first stop string in it."""
        answers: list[str] = []
        for at in range(0, len(prompts), self.config.batch):
            rows = [self.read(messages).tokens for messages in prompts[at : at + self.config.batch]]
            new = self.encoder.answer(rows, max_new_tokens)
            texts = [self.frozen.tokenizer.decode(_until(row, self.frozen.end_tokens)) for row in new]
            answers += [cut_at_stop(text, stop) for text in texts]
        return answers

    def read(self, messages: Messages) -> Reading:
        """A prompt in the expert's own words, and not longer than it reads."""
        own = worded(messages, self.config.template, self.config.system, self.style, self.config.parts)
        return self.frozen.chat.read(own, self.config.max_tokens)

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """(tokens, width) float32 features: the chosen layer's pooled states, normalised without parameters."""
        states = self.encoder.states(rows)
        return states if self.config.norm == "none" else [normalised(state) for state in states]

    def _feature_fingerprint(self) -> str:
        """What a router is trained for: neither the dtype nor the engine, which change states by rounding only."""
        c = self.config
        parts = [self.frozen.fingerprint(), c.layer, c.pool, c.tokens, c.norm, c.max_tokens]
        if c.weights != "stored":
            parts.append(c.weights)
        if c.parts:
            parts.append(f"parts: {c.parts!r}")
        parts += [
            f"{key}: {value!r}" for key, value in (("template", c.template), ("system", c.system)) if value is not None
        ]
        return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()


def normalised(states: np.ndarray) -> np.ndarray:
    """Every state with mean 0 and variance 1."""
    return layer_norm(torch.from_numpy(states), states.shape[-1:]).numpy()


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return next((tokens[:index] for index, token in enumerate(tokens) if token in ends), tokens)
