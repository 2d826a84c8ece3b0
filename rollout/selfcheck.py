"""Whether a policy's engine reads prefix, prompt and answer as the model itself does; see `experts.selfcheck`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from experts.loading import EmbeddingsOnly, FrozenModel
from experts.selfcheck import (
    NEW,
    SAMPLES,
    Finding,
    Probe,
    Tolerance,
    at_least,
    at_most,
    logprob_error,
    look,
    plain_logits,
    relative,
    tolerance,
    vocabulary,
)
from experts.stops import StopStrings
from rollout.engine import PolicyEngine, Request, TransformersEngine
from rollout.types import Completion, Sampling
from rollout.vllm import VllmPolicyEngine

HEAT = 4.0  # samples of a prompt must differ, also of a model that is sure of its answer
UNIT = 1.5  # by this factor the embeddings of some tokens may differ in size from those of all
SOME = 1024
SPREAD = "the logits' spread"


@torch.no_grad()
def check_policy(engine: PolicyEngine, embedding_rms: float, longest: int | None = None) -> list[Finding]:
    """All findings of a policy behind its engine.

    embedding_rms: the unit of its prefix, as the router gets it.
    longest: sequence that the engine takes; None takes the model's own.
    """
    bare = copy.copy(cast(TransformersEngine | VllmPolicyEngine, engine))
    policy = bare.policy = replace(bare.policy, end_tokens=())  # answers of one length
    probe, limits = Probe.of(policy, longest), tolerance(policy)
    found = _units(policy, embedding_rms)
    if isinstance(policy.model, EmbeddingsOnly):
        return [*found, *_check_vllm(cast(VllmPolicyEngine, bare), probe, limits)]
    return [*found, *_check_transformers(cast(TransformersEngine, bare), probe, limits)]


def _units(policy: FrozenModel, embedding_rms: float) -> list[Finding]:
    tokens = torch.linspace(0, vocabulary(policy) - 1, SOME, device=policy.device).long()
    embedded = policy.embed(tokens).double()

    def unit() -> tuple[bool, str]:
        own = embedded.pow(2).mean().sqrt().item()
        said = f"embeddings are as large as {own:.3g}, the unit of the prefix is {embedding_rms:.3g}"
        return own / UNIT <= embedding_rms <= own * UNIT, said

    def width() -> tuple[bool, str]:
        return policy.width == embedded.shape[-1], f"embeddings are {embedded.shape[-1]} wide, a prefix {policy.width}"

    return [look("width", width), look("unit", unit)]


def _check_transformers(engine: TransformersEngine, probe: Probe, limits: Tolerance) -> list[Finding]:
    policy, head = engine.policy, 1 if engine.position == "after_bos" else 0
    requests, long = _requests(probe), probe.tokens[1]
    from_ids = functools.cache(lambda: plain_logits(policy, long))
    together = functools.cache(lambda: engine.generate(requests, probe.prefix, _sampling()))

    def error(made: Sequence[Sequence[Completion]], rows: Sequence[int]) -> float:
        """The worst row's, of the answers made for these of the probe's."""
        worst = 0.0
        for row, group in zip(rows, made, strict=True):
            prefix = probe.own(row)
            sums = [
                logprob_error(c.logprobs, plain_logits(policy, probe.tokens[row], prefix, head, t), t, HEAT)
                for c in group
                for t in [c.tokens.tolist()]
            ]
            worst = max(worst, _ratio(sums))
        return worst

    def repeatable() -> tuple[bool, str]:
        return at_most(_difference(plain_logits(policy, long), from_ids()), limits.values, SPREAD)

    def embeddings() -> tuple[bool, str]:
        nothing = probe.prefix[0, :0]
        found = _difference(plain_logits(policy, long, nothing), from_ids())
        return at_most(found, limits.values, SPREAD)

    def prefix() -> tuple[bool, str]:
        short = probe.tokens[0]
        found = _difference(plain_logits(policy, short, probe.prefix[0], head), plain_logits(policy, short))
        return at_least(found, limits.change, SPREAD)

    def cache() -> tuple[bool, str]:
        made = engine.generate(requests[:1], probe.prefix[:1], _sampling())
        return at_most(error(made, [0]), limits.values, SPREAD)

    def batch() -> tuple[bool, str]:
        return at_most(error(together()[:2], [0, 1]), limits.values, SPREAD + probe.unreached)

    def gate() -> tuple[bool, str]:
        return at_most(error(together()[2:], [2]), limits.values, SPREAD)

    checks = (repeatable, embeddings, prefix, cache, batch, gate)
    return [look(check.__name__, check) for check in checks]


def _check_vllm(engine: VllmPolicyEngine, probe: Probe, limits: Tolerance) -> list[Finding]:
    """Against the engine itself, by greedy answers: its weights are nowhere else."""
    requests, greedy = _requests(probe), Sampling(temperature=0.0, max_new_tokens=NEW, samples=1)

    def asked(rows: Sequence[int], without: bool = False) -> list[Completion]:
        prefix = None if without else probe.prefix[list(rows)]
        return [group[0] for group in engine.generate([requests[row] for row in rows], prefix, greedy)]

    def read_as_ids(row: int) -> Completion:
        ((sample,),) = engine.engine.generate([probe.tokens[row]], 1, 0.0, NEW, (), None)
        return engine._completions([sample], StopStrings(engine.policy.tokenizer, ()))[0]

    def agree(some: Sequence[Completion], others: Sequence[Completion]) -> tuple[bool, str]:
        worst = max(map(_greedy_difference, some, others))
        return at_most(worst, limits.values, "a nat" + probe.unreached)

    def prefix() -> tuple[bool, str]:
        (shown,), (hidden,) = asked([0]), asked([0], without=True)
        changed = shown.tokens.tolist() != hidden.tokens.tolist()
        return at_least(max(_greedy_difference(shown, hidden), float(changed)), limits.change, "a nat")

    together = functools.cache(lambda: asked([0, 1, 2]))
    return [
        look("repeatable", lambda: agree(asked([1]), asked([1]))),
        look("embeddings", lambda: agree(asked([1], without=True), [read_as_ids(1)])),
        look("prefix", prefix),
        look("batch", lambda: agree(together()[:2], [asked([row])[0] for row in (0, 1)])),
        look("gate", lambda: agree(together()[2:], [read_as_ids(2)])),
    ]


def _requests(probe: Probe) -> list[Request]:
    """With draws of their own for every sample."""
    draws = np.random.default_rng(1).random((len(probe.tokens), SAMPLES, NEW))
    return [
        Request(tokens, mine, open=shown) for tokens, mine, shown in zip(probe.tokens, draws, probe.open, strict=True)
    ]


def _sampling() -> Sampling:
    return Sampling(temperature=HEAT, max_new_tokens=NEW, samples=SAMPLES)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Of two distributions' logits, whose level means nothing."""
    one, other = (logits[-1] - logits[-1].mean() for logits in (found, wanted))
    return relative(one, other)


def _ratio(sums: Sequence[tuple[float, float]]) -> float:
    error, spread = (sum(each) for each in zip(*sums, strict=True))
    return (error / spread) ** 0.5


def _greedy_difference(one: Completion, other: Completion) -> float:
    """Of log-probabilities, up to and with the first token that differs: of two that are nearly as likely."""
    differing = np.flatnonzero(one.tokens != other.tokens)
    compared = slice(0, int(differing[0]) + 1 if len(differing) else len(one.tokens))
    return float(np.abs(one.logprobs[compared] - other.logprobs[compared]).max())
