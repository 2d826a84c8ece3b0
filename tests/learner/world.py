"""A small world for the learner's tests: a random policy, made-up features, real rollouts of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.config import PrefixConfig, RouterConfig
from experts.expert import Encoded
from experts.state import RouterShape, RouterSnapshot
from learner.algorithms import TokenBatch
from learner.batch import global_denominators
from learner.config import AlgorithmConfig, LearnerConfig
from learner.engine import Rendezvous
from learner.learner import LearnerRank, LearnerSpec
from rollout.config import PolicyConfig
from rollout.types import Completion, Group, Prompt, RewardStatus, Rollout, Sampling, Score
from rollout.worker import RolloutWorker

TEXTS = ("1+2=", "what is 12 - 5?", "a?", "count the legs of 3 cats", "9*9", "sum 4 5 6:", "b = 2, c = ?")
WIDTHS, TOKENS = (6, 10), (1, 3)
Scores = Sequence[Sequence[float | None]]


def router_config(position: str = "front", dropout: float = 0.0, **prefix: Any) -> RouterConfig:
    """A small router whose prefix is as large as the policy's embeddings, so that it matters."""
    settings = PrefixConfig.model_validate({"scale": 1.0, "position": position, **prefix})
    return RouterConfig(width=16, latents=3, heads=4, expert_dropout=dropout, prefix=settings)


def prompts(count: int, start: int = 0) -> list[Prompt]:
    """Prompts of different lengths."""
    return [
        Prompt(
            ordinal=n, task="t", messages=({"role": "user", "content": TEXTS[n % len(TEXTS)] * (1 + n % 2)},), answer=""
        )
        for n in range(start, start + count)
    ]


def encode(some: Sequence[Prompt], seed: int = 7) -> tuple[Encoded, ...]:
    """Made-up features of two experts, which depend on the prompt alone."""
    return tuple(
        Encoded(
            name,
            tuple(f"{name}-{p.ordinal}" for p in some),
            tuple(
                np.random.default_rng([seed, p.ordinal, width]).standard_normal((tokens, width)).astype(np.float32)
                for p in some
            ),
            0,
            0,
            0.0,
            tuple(range(len(some))),
        )
        for name, width, tokens in zip(("left", "right"), WIDTHS, TOKENS, strict=True)
    )


@dataclass(frozen=True)
class World:
    """One policy on disk with a rollout worker for it."""

    policy: Path
    router: RouterConfig
    worker: RolloutWorker
    shape: RouterShape

    @classmethod
    def of(cls, policy: Path, router: RouterConfig | None = None, **engine: Any) -> World:
        """A world around a saved policy."""
        router = router or router_config()
        worker = RolloutWorker(PolicyConfig(model=str(policy), **engine), str(policy), router, seed=3)
        info = worker.info()
        names = ("left", "right")
        shape = RouterShape(names, WIDTHS, (-1, -1), names, info["width"], info["fingerprint"], info["embedding_rms"])
        worker.attach(shape)
        return cls(policy, router, worker, shape)

    def spec(self, *, staleness: int = 0, learner: dict[str, Any] | None = None, **algorithm: Any) -> LearnerSpec:
        """What a learner of this world is built from; the clip of the gradient's norm is far away."""
        settings = {"groups": 4, "clip": 1e6, "warmup_steps": 0, "learning_rate": 1e-2} | (learner or {})
        return LearnerSpec(
            learner=LearnerConfig.model_validate(settings),
            algorithm=AlgorithmConfig.model_validate(algorithm),
            router=self.router,
            policy_path=str(self.policy),
            policy_dtype="float32",
            shape=self.shape,
            seed=11,
            max_staleness=staleness,
            steps=1000,
        )

    def learner(self, place: Rendezvous | None = None, **settings: Any) -> LearnerRank:
        """A rank; alone unless a place is given."""
        return LearnerRank(self.spec(**settings), place or Rendezvous())

    def roll(
        self, some: Sequence[Prompt], router: RouterSnapshot, temperature: float = 1.0, samples: int = 4
    ) -> Rollout:
        """Groups of up to six tokens a completion, all lengths from 1 to 6 among them."""
        sampling = Sampling(temperature=temperature, max_new_tokens=6, samples=samples)
        rollout = self.worker.generate(some, sampling, router, *encode(some))
        return rollout.with_groups([_uneven(group) for group in rollout.groups])

    def scored(
        self, some: Sequence[Prompt], router: RouterSnapshot, scores: Scores | None = None, **how: Any
    ) -> Rollout:
        """Rolled and scored; None in `scores` is a verifier that timed out."""
        rollout = self.roll(some, router, **how)
        rows = scores or [made_up_scores(g.ordinal, len(g.completions)) for g in rollout.groups]
        return rollout.with_groups([score(g, row) for g, row in zip(rollout.groups, rows, strict=True)])


def made_up_scores(ordinal: int, samples: int) -> list[float]:
    """Rewards that differ within every group."""
    return [float((ordinal * 3 + i * i) % 5) / 4 for i in range(samples)]


def score(group: Group, rewards: Sequence[float | None]) -> Group:
    """A group with these rewards."""
    timeout = Score(reward=float("nan"), status=RewardStatus.TIMEOUT)
    return group.scored(tuple(timeout if r is None else Score(reward=r) for r in rewards))


def update(learner: LearnerRank, rollout: Rollout, seed: int = 7) -> Any:
    """One update of a lone rank on all groups of a rollout."""
    some = [group.prompt for group in rollout.groups]
    return learner.update([p.ordinal for p in some], rollout, *encode(some, seed))


def backward(learner: LearnerRank, groups: Sequence[Group], seed: int = 7) -> Any:
    """An update's first half, for a lone rank: leaves the gradients in the engine."""
    features = [list(e.features) for e in encode([g.prompt for g in groups], seed)]
    return learner.backward(groups, features, global_denominators(groups, learner.spec.algorithm.constant_length))


def _uneven(group: Group) -> Group:
    def cut(completion: Completion, length: int) -> Completion:
        return replace(completion, tokens=completion.tokens[:length], logprobs=completion.logprobs[:length])

    lengths = [1 + (group.ordinal + 2 * i) % 6 for i in range(len(group.completions))]
    return replace(group, completions=tuple(cut(c, n) for c, n in zip(group.completions, lengths, strict=True)))


def batches_seen(
    learner: LearnerRank, groups: Sequence[Group], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Sequence[Group], TokenBatch]]:
    """What the loss is given in an update's first half, with the groups of each micro-batch."""
    seen: list[tuple[Sequence[Group], TokenBatch]] = []
    share, loss = learner.gradient._loss, learner.gradient.algorithm.loss
    current: list[Sequence[Group]] = []
    monkeypatch.setattr(learner.gradient, "_loss", lambda some, *rest: current.append(some) or share(some, *rest))
    monkeypatch.setattr(
        learner.gradient.algorithm, "loss", lambda batch, d: seen.append((current[-1], batch)) or loss(batch, d)
    )
    backward(learner, groups)
    return seen


def flat(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    """All arrays in one vector, in name order."""
    return torch.cat([torch.from_numpy(np.array(arrays[name])).flatten() for name in sorted(arrays)])
