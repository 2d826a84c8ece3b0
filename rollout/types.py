"""What flows through a run: prompts, completions, groups.

Everything here is plain data (numpy on the wire, no torch), so that any worker can hold it and a
checkpoint can write it down.  The driver, the workers and the learner agree on these types and on
nothing else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypedDict

import numpy as np


class Message(TypedDict):
    """One chat turn; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class RewardStatus(StrEnum):
    """How scoring a completion ended.  Only `OK` rewards take part in learning."""

    OK = "ok"
    TIMEOUT = "timeout"
    ERROR = "error"


class FinishReason(StrEnum):
    """Why a completion ended: an end token was sampled, or the length limit cut it."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task instance.

    ordinal: position in the task stream, unique in a run (evaluation prompts count from 0).
    task: the task's name in the configuration.
    messages: the chat turns a model is shown; models without a chat template see their contents,
        joined by newlines.
    answer: the gold answer as text.
    payload: what the task's verifier needs, e.g. the Reasoning Gym entry.
    """

    ordinal: int
    task: str
    messages: tuple[Message, ...]
    answer: str
    payload: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The messages' contents, one per line: what a model without a chat template reads."""
        return "\n".join(message["content"] for message in self.messages)

    @property
    def key(self) -> str:
        """Hash of the text: identifies the prompt across splits, runs and zoo building."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Effective sampling parameters.  `temperature` 0 is greedy (evaluation only)."""

    temperature: float
    max_new_tokens: int
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer.

    tokens: (length,) int64, the end token included when it was sampled.
    logprobs: (length,) float32, log-probabilities of `tokens` under the distribution that was
        sampled from, temperature included.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finish: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A verifier's verdict on one completion; `reward` is meaningless unless `status` is OK."""

    reward: float
    status: RewardStatus = RewardStatus.OK
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Every random draw of the collaborator for one group, so that the learner can repeat it.

    expert_mask: (experts,) bool, True where the expert was visible to the router.
    """

    expert_mask: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStamp:
    """Which trainable state produced something: its version, incarnation and checksum."""

    version: int
    incarnation: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt with its G completions, under exactly one router version.

    prompt_tokens: (prompt,) int64 in the policy's vocabulary.
    prefix_hash: hash of the soft prefix as handed to the engine, for audits.
    prefix_sketch: (slots,) float32 projection of the prefix; the learner rebuilds the prefix from
        `feature_keys` and `draws` and refuses the group when its sketch differs.
    feature_keys: one cache key per expert, in the router's order; the tensors travel beside it.
    attention: (latents, experts) float32, averaged over heads.
    scores: one per completion once the verifiers have answered, else empty.
    """

    prompt: Prompt
    prompt_tokens: np.ndarray
    completions: tuple[Completion, ...]
    sampling: Sampling
    router: RouterStamp
    draws: Draws
    prefix_hash: str
    prefix_sketch: np.ndarray
    prefix_rms_ratio: float
    feature_keys: tuple[str, ...]
    attention: np.ndarray
    scores: tuple[Score, ...] = ()

    @property
    def ordinal(self) -> int:
        """The prompt's position in the task stream."""
        return self.prompt.ordinal

    def scored(self, scores: tuple[Score, ...]) -> Group:
        """This group with its verifiers' verdicts.

        Raises:
            ValueError: when there is not exactly one score per completion.
        """
        if len(scores) != len(self.completions):
            raise ValueError(f"prompt {self.ordinal}: {len(scores)} scores for {len(self.completions)} completions")
        return replace(self, scores=scores)


@dataclass(frozen=True, slots=True)
class Rollout:
    """Groups of some prompts, with what it cost to make them.

    tokens: completion tokens sampled.  hits, misses: of the experts' feature caches.
    seconds, encode_s: wall-clock time in the rollout worker, and in the slowest expert.
    """

    groups: tuple[Group, ...]
    tokens: int
    hits: int
    misses: int
    seconds: float
    encode_s: float
