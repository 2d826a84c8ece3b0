"""What flows through a run: prompts, completions, groups.

Everything here is plain data (numpy on the wire, no torch), so that any worker can hold it and a
checkpoint can write it down.  The driver, the workers and the learner agree on these types and on
nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypedDict, TypeVar

import numpy as np

from rollout.operations import NO_OPERATIONS, Operations

T = TypeVar("T")


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
    """Why a completion ended: an end token was sampled or a stop string completed, or the length limit cut it."""

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
    """Effective sampling parameters.

    temperature: 0 is greedy (evaluation only).
    stop: texts; a completion ends with the token that completes the first of them.
    """

    temperature: float
    max_new_tokens: int
    samples: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled answer.

    tokens: (length,) int64, with the end token or the token that completed a stop string, which were sampled like any
        other.
    logprobs: (length,) float32, log-probabilities of `tokens` under the distribution that was
        sampled from, temperature included.
    text: what verifiers read: the tokens decoded, without the end token, up to a stop string.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finish: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A verifier's verdict on one completion; the numbers are meaningless unless `status` is OK.

    reward: what is trained on.
    answer: the answer's own score, which says whether it is right; None where that is the reward.
    reason: why there is no verdict, or why the answer is unreadable.
    unreadable: whether it is wrong because its verifier could not read it.
    """

    reward: float
    status: RewardStatus = RewardStatus.OK
    reason: str = ""
    answer: float | None = None
    unreadable: bool = False

    @property
    def right(self) -> float:
        """The answer's own score."""
        return self.reward if self.answer is None else self.answer

    def row(self) -> tuple[float, str, str, float | None, bool]:
        """As plain data."""
        return self.reward, self.status.value, self.reason, self.answer, self.unreadable

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Score:
        """What `row` made, or what it made when answers could not be unreadable yet."""
        reward, status, reason, answer, *rest = row
        return cls(reward=reward, status=RewardStatus(status), reason=reason, answer=answer, unreadable=any(rest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Every random draw of the collaborator for one group, so that the learner can repeat it.

    expert_mask: (experts,) bool, True where the expert was visible to the router.
    choice, choice_logprob: which option a router that chooses took, and how likely that was; -1 if it does not choose.
    open: whether the policy got the prefix at all.
    """

    expert_mask: np.ndarray
    choice: int = -1
    choice_logprob: float = 0.0
    open: bool = True


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
class GroupFacts:
    """What bookkeeping needs of a group.

    truncated: completions that the length limit cut.  attention: as the group's.  bytes: of its arrays.
    """

    ordinal: int
    task: str
    version: int
    truncated: int
    prefix_rms_ratio: float
    attention: np.ndarray
    bytes: int


class Rollout:
    """Groups of some prompts, with what it cost to make them.

    On the wire it is a few flat arrays: as single objects, pickling took longer than scoring.  One that came over the
    wire becomes objects only when its groups are asked for; a reward worker needs no more than the texts.

    tokens: completion tokens sampled.  hits, misses: of the experts' feature caches.
    seconds, encode_s: wall-clock time in the rollout worker, and in the slowest expert.
    operations: see `Operations`.
    cut: by expert, in the router's order, number of prompts whose middle it did not see; empty where none was asked.
    """

    __slots__ = ("_groups", "_wire", "cut", "encode_s", "hits", "misses", "operations", "seconds", "tokens")

    def __init__(
        self,
        groups: tuple[Group, ...],
        tokens: int,
        hits: int,
        misses: int,
        seconds: float,
        encode_s: float,
        operations: Operations = NO_OPERATIONS,
        cut: tuple[int, ...] = (),
    ) -> None:
        self._groups: tuple[Group, ...] | None = groups
        self._wire: tuple[Any, ...] = ()
        self.tokens, self.hits, self.misses, self.seconds, self.encode_s = tokens, hits, misses, seconds, encode_s
        self.operations, self.cut = operations, cut

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_wire, (self._wire or _pack(self.groups), *self._cost())

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups as objects."""
        if self._groups is None:
            self._groups = _unpack(self._wire)
        return self._groups

    def with_groups(self, groups: Sequence[Group]) -> Rollout:
        """The same rollout with other groups."""
        return Rollout(tuple(groups), *self._cost())

    def scored(self, scores: Sequence[Sequence[Score]]) -> Rollout:
        """The same rollout with its verifiers' verdicts, one list a group."""
        if self._groups is not None:
            return self.with_groups([g.scored(tuple(mine)) for g, mine in zip(self._groups, scores, strict=True)])
        for (ordinal, *_), (count, _), mine in zip(self._wire[0], self._wire[4], scores, strict=True):
            if len(mine) != count:
                raise ValueError(f"prompt {ordinal}: {len(mine)} scores for {count} completions")
        counts = [(count, count) for count, _ in self._wire[4]]
        return _from_wire((*self._wire[:4], counts, *self._wire[5:15], *_pack_scores(scores)), *self._cost())

    def answers(self) -> list[tuple[Prompt, list[str]]]:
        """Every group's prompt and the texts of its completions."""
        if self._groups is not None:
            return [(group.prompt, [c.text for c in group.completions]) for group in self._groups]
        prompts, _, _, _, counts, *_ = self._wire
        texts, said = self._wire[12], iter(self._wire[14])
        return [
            (_prompt(prompt), [texts[place] for place in itertools.islice(said, count)])
            for prompt, (count, _) in zip(prompts, counts, strict=True)
        ]

    def facts(self) -> list[GroupFacts]:
        """What bookkeeping needs of every group."""
        if self._groups is not None:
            return [_facts(group) for group in self._groups]
        prompts, _, routers, prefixes, counts, _, prompt_tokens, _, _, attentions, tokens, *_ = self._wire
        cut, said = [finish == FinishReason.LENGTH.value for finish in self._wire[13]], iter(self._wire[14])
        sizes = [shape[0] * _BYTES_A_TOKEN for shape in tokens[1]]
        columns = zip(prompts, routers, prefixes, counts, prompt_tokens[1], _cut(attentions), strict=True)
        found = []
        for (ordinal, task, *_), (version, *_), (_, ratio, _), (count, _), shape, attention in columns:
            mine = list(itertools.islice(said, count))
            size = 8 * shape[0] + sum(sizes[place] for place in set(mine))
            found.append(GroupFacts(ordinal, task, version, sum(cut[p] for p in mine), ratio, attention, size))
        return found

    def _cost(self) -> tuple[Any, ...]:
        return self.tokens, self.hits, self.misses, self.seconds, self.encode_s, self.operations, self.cut


_BYTES_A_TOKEN = 12  # an id and a log-probability


def _from_wire(wire: tuple[Any, ...], *cost: Any) -> Rollout:
    rollout = Rollout((), *cost)
    rollout._groups, rollout._wire = None, wire
    return rollout


def _facts(group: Group) -> GroupFacts:
    distinct, _ = distinct_objects(group.completions)
    return GroupFacts(
        group.ordinal,
        group.prompt.task,
        group.router.version,
        sum(completion.finish is FinishReason.LENGTH for completion in group.completions),
        group.prefix_rms_ratio,
        group.attention,
        group.prompt_tokens.nbytes
        + sum(completion.tokens.nbytes + completion.logprobs.nbytes for completion in distinct),
    )


Ragged = tuple[np.ndarray, list[tuple[int, ...]]]


def _join(arrays: Sequence[np.ndarray], dtype: Any) -> Ragged:
    """Arrays of any shapes as one flat one, and their shapes."""
    flat = [np.ascontiguousarray(array, dtype=dtype).reshape(-1) for array in arrays]
    return (np.concatenate(flat) if flat else np.zeros(0, dtype), [array.shape for array in arrays])


def _cut(ragged: Ragged) -> Iterator[np.ndarray]:
    flat, shapes = ragged
    end = 0
    for shape in shapes:
        start, end = end, end + math.prod(shape)
        yield flat[start:end].reshape(shape)


def _pack(groups: Sequence[Group]) -> tuple[Any, ...]:
    completions, said = distinct_objects([completion for group in groups for completion in group.completions])
    return (
        [(g.prompt.ordinal, g.prompt.task, g.prompt.messages, g.prompt.answer, g.prompt.payload) for g in groups],
        [(g.sampling.temperature, g.sampling.max_new_tokens, g.sampling.samples, g.sampling.stop) for g in groups],
        [(g.router.version, g.router.incarnation, g.router.checksum) for g in groups],
        [(g.prefix_hash, g.prefix_rms_ratio, g.feature_keys) for g in groups],
        [(len(g.completions), len(g.scores)) for g in groups],
        [(g.draws.choice, g.draws.choice_logprob, g.draws.open) for g in groups],
        _join([g.prompt_tokens for g in groups], np.int64),
        _join([g.draws.expert_mask for g in groups], bool),
        _join([g.prefix_sketch for g in groups], np.float32),
        _join([g.attention for g in groups], np.float32),
        _join([c.tokens for c in completions], np.int64),
        _join([c.logprobs for c in completions], np.float32),
        [c.text for c in completions],
        [c.finish.value for c in completions],
        said,
        *_pack_scores([group.scores for group in groups]),
    )


def _pack_scores(scores: Sequence[Sequence[Score]]) -> tuple[list[Any], list[int]]:
    distinct, places = distinct_objects([score for mine in scores for score in mine])
    return [score.row() for score in distinct], places


def _prompt(packed: tuple[Any, ...]) -> Prompt:
    ordinal, task, messages, answer, payload = packed
    return Prompt(ordinal=ordinal, task=task, messages=messages, answer=answer, payload=payload)


def distinct_objects(objects: Sequence[T]) -> tuple[list[T], list[int]]:
    """Every object once, and for each of the sequence its place among them."""
    places: dict[int, int] = {}
    for item in objects:
        places.setdefault(id(item), len(places))
    once = list({id(item): item for item in objects}.values())
    return once, [places[id(item)] for item in objects]


def _unpack(packed: tuple[Any, ...]) -> tuple[Group, ...]:
    prompts, samplings, routers, prefixes, counts, choices, *rest = packed
    tokenised, masks, sketches, attentions, tokens, logprobs, texts, finishes, said, verdicts, scored = rest
    distinct = [
        Completion(tokens=t, logprobs=p, text=text, finish=FinishReason(finish))
        for t, p, text, finish in zip(_cut(tokens), _cut(logprobs), texts, finishes, strict=True)
    ]
    judged = [Score.from_row(row) for row in verdicts]
    completions, scores = (distinct[i] for i in said), (judged[i] for i in scored)
    columns = zip(prompts, samplings, routers, prefixes, counts, choices, strict=True)
    arrays = zip(_cut(tokenised), _cut(masks), _cut(sketches), _cut(attentions), strict=True)
    return tuple(
        Group(
            prompt=_prompt(prompt),
            prompt_tokens=prompt_tokens,
            completions=tuple(itertools.islice(completions, count)),
            sampling=Sampling(
                temperature=sampling[0], max_new_tokens=sampling[1], samples=sampling[2], stop=sampling[3]
            ),
            router=RouterStamp(version=router[0], incarnation=router[1], checksum=router[2]),
            draws=Draws(expert_mask=mask, choice=choice[0], choice_logprob=choice[1], open=choice[2]),
            prefix_hash=prefix[0],
            prefix_sketch=sketch,
            prefix_rms_ratio=prefix[1],
            feature_keys=prefix[2],
            attention=attention,
            scores=tuple(itertools.islice(scores, score_count)),
        )
        for (prompt, sampling, router, prefix, (count, score_count), choice), (
            prompt_tokens,
            mask,
            sketch,
            attention,
        ) in zip(columns, arrays, strict=True)
    )
