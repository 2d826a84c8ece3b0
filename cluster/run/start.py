"""Building the workers of a run: as Ray actors, or in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import RunConfig
from cluster.run.fleet import Fleet, Handle, Inline
from cluster.run.preflight import model_path
from cluster.run.recipe import Recipe
from cluster.run.scoring import AsyncScoringWorker, ScoringWorker
from experts.expert import Expert
from experts.state import RouterShape
from learner.engine import Rendezvous
from learner.learner import LearnerRank, LearnerSpec
from rewards.verify import Verifier
from rollout.worker import RolloutWorker


@dataclass(frozen=True)
class Started:
    """Workers that are ready, and what they said about their frozen models.

    experts, policy: name, width, parameters, fingerprint and weight hash of each.
    """

    fleet: Fleet
    shape: RouterShape
    experts: list[dict[str, Any]]
    policy: dict[str, Any]


def share_of_cores(config: RunConfig, workers: int, wanted: int) -> int:
    """Torch threads of a worker whose stage has so many: what is asked for, else an even share of the machine."""
    return wanted or config.threads or max(1, (os.cpu_count() or 1) // workers)


def expert_recipes(config: RunConfig) -> list[Recipe]:
    """One worker an expert."""
    return [
        Recipe(
            f"Expert({e.name})",
            Expert,
            (e, model_path(e.model), config.cache, share_of_cores(config, len(config.experts), e.threads)),
            e.cpus,
            e.gpus,
        )
        for e in config.experts
    ]


def rollout_recipes(config: RunConfig) -> list[Recipe]:
    """The policy's workers."""
    p = config.policy
    threads = share_of_cores(config, p.workers, p.threads)
    args = (p, model_path(p.model), config.router, config.seed)
    return [Recipe(f"Rollout({i})", RolloutWorker, (*args, i, threads), p.cpus, p.gpus) for i in range(p.workers)]


def learner_spec(config: RunConfig, shape: RouterShape) -> LearnerSpec:
    """What every learner rank is built from."""
    return LearnerSpec(
        learner=config.learner,
        algorithm=config.algorithm,
        router=config.router,
        policy_path=model_path(config.policy.model),
        policy_dtype=config.policy.dtype,
        shape=shape,
        seed=config.seed,
        max_staleness=config.max_staleness,
        steps=config.steps,
        threads=share_of_cores(config, config.learner.ranks, config.learner.threads),
    )


def shape_of(config: RunConfig, experts: list[dict[str, Any]], policy: dict[str, Any]) -> RouterShape:
    """What the router belongs to."""
    return RouterShape(
        experts=tuple(e.name for e in config.experts),
        widths=tuple(info["width"] for info in experts),
        layers=tuple(e.layer for e in config.experts),
        expert_fingerprints=tuple(info["fingerprint"] for info in experts),
        policy_width=policy["width"],
        policy_fingerprint=policy["fingerprint"],
        embedding_rms=policy["embedding_rms"],
    )


def start_inline(config: RunConfig, verifiers: Mapping[str, Verifier]) -> Started:
    """All workers in this process: for debuggers, notebooks, and as the yardstick of the distributed overhead."""

    def build(recipe: Recipe) -> Inline:
        return Inline(recipe.name, recipe.kind(*recipe.args))

    experts = [build(r) for r in expert_recipes(config)]
    rollouts = [build(r) for r in rollout_recipes(config)]
    expert_infos = [e.worker.info() for e in experts]
    policy_info = rollouts[0].worker.info()
    shape = shape_of(config, expert_infos, policy_info)
    rollouts[0].worker.attach(shape)
    rewards = [Inline("Reward(0)", ScoringWorker(verifiers, config.rewards))]
    learners = [Inline("Learner(rank 0)", LearnerRank(learner_spec(config, shape), Rendezvous()))]
    fleet = Fleet(experts, rollouts, rewards, learners, config.ray.deadline_s)
    return Started(fleet, shape, expert_infos, policy_info)


async def start_on_ray(config: RunConfig, verifiers: Mapping[str, Verifier]) -> Started:
    """All workers as actors of a Ray cluster this process has joined; models load in parallel."""
    from cluster.run.actors import LearnerActor, spawn
    from cluster.run.faults import RayBackend

    backend = RayBackend()
    experts = [spawn(r) for r in expert_recipes(config)]
    rollouts = [spawn(r) for r in rollout_recipes(config)]
    rewards = [
        spawn(Recipe(f"Reward({i})", AsyncScoringWorker, (dict(verifiers), config.rewards, i)), concurrency=16)
        for i in range(config.rewards.workers)
    ]
    c = config.learner
    learners = [spawn(Recipe(f"Learner(rank {r})", LearnerActor, (r,), c.cpus, c.gpus)) for r in range(c.ranks)]
    ray = config.ray
    fleet = Fleet(experts, rollouts, rewards, learners, ray.deadline_s, backend, ray.start_deadline_s)
    asked = [handle.call("info") for handle in [*experts, *rollouts]]
    infos = await fleet.get_all(asked, "starting the experts and the policy", ray.start_deadline_s)
    expert_infos, policy_info = infos[: len(experts)], infos[len(experts)]
    shape = shape_of(config, expert_infos, policy_info)
    told = [rank.start_with("configure", learner_spec(config, shape)) for rank in learners]
    attached = [r.start_with("attach", shape) for r in rollouts]
    waits = [join_ranks(fleet, learners), *told, *attached]
    await fleet.get_all(waits, "starting the learner", ray.start_deadline_s)
    return Started(fleet, shape, expert_infos, policy_info)


async def join_ranks(fleet: Fleet, ranks: Sequence[Handle]) -> None:
    """Builds a learner from its placed but still empty ranks: they meet where rank 0 is."""
    host, port = await fleet.get(ranks[0].call("rendezvous"), "placing the learner", fleet.start_deadline_s)
    joins = [h.call("join", Rendezvous(rank, len(ranks), host, port)) for rank, h in enumerate(ranks)]
    await fleet.get_all(joins, "joining the learner's ranks", fleet.start_deadline_s)
