"""Building the workers of a run: as Ray actors, or in this process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import RunConfig
from cluster.run.asked import answer_tokens
from cluster.run.fleet import Fleet, Handle, Inline
from cluster.run.models import model_path
from cluster.run.recipe import Recipe
from cluster.run.recovery import unstarted
from cluster.run.replicas import Replicas
from cluster.run.scoring import AsyncScoringWorker, ScoringWorker
from experts.config import ExpertConfig
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
    frozen: by worker's name, which model it holds, of how many parameters, and its hash at the start.
    """

    fleet: Fleet
    shape: RouterShape
    experts: list[dict[str, Any]]
    policy: dict[str, Any]
    frozen: dict[str, dict[str, Any]]

    def __post_init__(self) -> None:
        self.fleet.encoders = frozenset(place for place, info in enumerate(self.experts) if not info["answers"])


def share_of_cores(config: RunConfig, workers: int, wanted: int) -> int:
    """Torch threads of a worker whose stage has so many: what is asked for, else an even share of the machine."""
    return wanted or config.threads or max(1, (os.cpu_count() or 1) // workers)


def expert_recipes(config: RunConfig) -> list[list[Recipe]]:
    """For every expert, one worker a replica."""
    workers = sum(e.replicas for e in config.experts)
    return [[_expert_recipe(config, e, i, workers) for i in range(e.replicas)] for e in config.experts]


def _expert_recipe(config: RunConfig, e: ExpertConfig, replica: int, workers: int) -> Recipe:
    name = f"Expert({e.name}, replica {replica})" if e.replicas > 1 else f"Expert({e.name})"
    threads = share_of_cores(config, workers, e.threads)
    args = (e, model_path(e.model), config.cache, threads, config.prompt_style)
    return Recipe(name, Expert, args, e.cpus, e.gpus)


def rollout_recipes(config: RunConfig) -> list[Recipe]:
    """The policy's workers."""
    p = config.policy
    threads = share_of_cores(config, p.workers, p.threads)
    text = config.router.text.model_copy(update={"max_new_tokens": answer_tokens(config)})
    args = (p, model_path(p.model), config.router.model_copy(update={"text": text}), config.seed)
    date = config.data.date
    return [Recipe(f"Rollout({i})", RolloutWorker, (*args, i, threads, date), p.cpus, p.gpus) for i in range(p.workers)]


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
        lora=config.policy.lora,
        experts_dtypes=tuple(expert.dtype for expert in config.experts),
        self_check=config.policy.self_check,
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
        norms=tuple(e.norm for e in config.experts),
    )


def start_inline(config: RunConfig, verifiers: Mapping[str, Verifier]) -> Started:
    """All workers in this process: for debuggers, notebooks, and as the yardstick of the distributed overhead."""

    with contextlib.ExitStack() as built:
        started = _start_inline(config, verifiers, built)
        built.pop_all()
    return started


def _start_inline(config: RunConfig, verifiers: Mapping[str, Verifier], built: contextlib.ExitStack) -> Started:
    """`built` ends the engines that already run, should a later worker fail to start."""

    def build(recipe: Recipe) -> Inline:
        made = Inline(recipe.name, recipe.kind(*recipe.args))
        built.callback(made.worker.close)
        return made

    experts = [build(recipes[0]) for recipes in expert_recipes(config)]
    rollouts = [build(r) for r in rollout_recipes(config)]
    expert_infos = [e.worker.info() for e in experts]
    policy_info = rollouts[0].worker.info()
    shape = shape_of(config, expert_infos, policy_info)
    rollouts[0].worker.attach(shape)
    rewards = [Inline("Reward(0)", ScoringWorker(verifiers, config.rewards))]
    learners = [Inline("Learner(rank 0)", LearnerRank(learner_spec(config, shape), Rendezvous()))]
    fleet = Fleet(experts, rollouts, rewards, learners, config.ray.deadline_s)
    infos = {
        handle.name: info for handle, info in zip([*experts, *rollouts], [*expert_infos, policy_info], strict=True)
    }
    hashes = {"Learner(rank 0)": learners[0].worker.sha256()}
    return Started(fleet, shape, expert_infos, policy_info, _frozen(infos, hashes, policy_info))


async def start_on_ray(
    config: RunConfig, verifiers: Mapping[str, Verifier], note: Callable[[str], None] = print
) -> Started:
    """All workers as actors of a Ray cluster this process has joined; models load in parallel.

    note: tells people what the start waits for.
    """
    from cluster.run.actors import ExpertActor, LearnerActor, RolloutActor, spawn
    from cluster.run.faults import RayBackend
    from cluster.run.seats import claim, names_free, seats

    backend, ray, c = RayBackend(), config.ray, config.learner
    several = config.pipeline.calls_per_worker + 2 if config.policy.engine == "vllm" else 1
    scoring = [
        Recipe(f"Reward({i})", AsyncScoringWorker, (dict(verifiers), config.rewards, i))
        for i in range(config.rewards.workers)
    ]
    ranks = [Recipe(f"Learner(rank {r})", LearnerActor, (r,), c.cpus, c.gpus) for r in range(c.ranks)]
    wanted = expert_recipes(config)
    policy, at = rollout_recipes(config), ray.placement
    await names_free(ray.deadline_s)
    asked = claim(
        {
            "experts": ([recipe for recipes in wanted for recipe in recipes], at.experts),
            "policy": (policy, at.policy),
            "learner": (ranks, at.learner),
        }
    )
    free = {role: iter(await seats(its, ray.start_deadline_s, note)) for role, its in asked.items()}
    copies = [[spawn(placed(ExpertActor, r), next(free["experts"])) for r in recipes] for recipes in wanted]
    experts = [handle for handles in copies for handle in handles]
    rollouts = [spawn(placed(RolloutActor, r), next(free["policy"]), several) for r in policy]
    rewards = [spawn(recipe, "SPREAD", concurrency=16) for recipe in scoring]
    learners = [spawn(r, next(free["learner"])) for r in ranks]
    pools = [Replicas(handles, steady=config.max_staleness == 0) for handles in copies]
    fleet = Fleet(experts, rollouts, rewards, learners, ray.deadline_s, backend, ray.start_deadline_s, copies=pools)
    try:
        return await _ready(config, fleet, copies, rollouts)
    except backend.errors as error:
        raise await unstarted(error, fleet) from error


async def _ready(config: RunConfig, fleet: Fleet, copies: Sequence[Sequence[Any]], rollouts: Sequence[Any]) -> Started:
    """Loads the models, and tells every worker of the others."""
    ray = config.ray
    learners: Sequence[Any] = fleet.learners
    hosts: list[Any] = [*(handle for handles in copies for handle in handles), *rollouts]
    await load_in_turn(fleet, hosts)
    answers = await fleet.get_all(
        [handle.call("info") for handle in hosts], "what the experts and the policy are", ray.start_deadline_s
    )
    infos = {handle.name: info for handle, info in zip(hosts, answers, strict=True)}
    expert_infos, policy_info = [infos[handles[0].name] for handles in copies], infos[rollouts[0].name]
    shape = shape_of(config, expert_infos, policy_info)
    told = [rank.start_with("configure", learner_spec(config, shape)) for rank in learners]
    attached = [r.start_with("attach", shape) for r in rollouts]
    waits = [join_ranks(fleet, learners), *told, *attached]
    await fleet.get_all(waits, "starting the learner", ray.start_deadline_s)
    digests = await fleet.get_all([rank.call("sha256") for rank in learners], "hashing the learner's policy")
    hashes = {rank.name: digest for rank, digest in zip(learners, digests, strict=True)}
    return Started(fleet, shape, expert_infos, policy_info, _frozen(infos, hashes, policy_info))


def placed(kind: type, recipe: Recipe) -> Recipe:
    """The same worker as an actor that is placed before it loads."""
    return Recipe(recipe.name, kind, (recipe.name, *recipe.args), recipe.cpus, recipe.gpus)


async def load_in_turn(fleet: Fleet, handles: Sequence[Any]) -> None:
    """Loads the models: all at once, but one after the other on the same GPU, whose free memory an engine measures."""
    what, limit = "loading the experts and the policy", fleet.start_deadline_s
    places = await fleet.get_all([handle.call("place") for handle in handles], "placing the workers", limit)
    taken: dict[tuple[str, str], asyncio.Future[Any]] = {}

    async def after(before: list[asyncio.Future[Any]], handle: Any) -> None:
        if before:
            await asyncio.gather(*before)
        await fleet.get(handle.start_with("load", later="reload"), f"{what}: {handle.name}", limit)

    loading = []
    for handle, (node, gpus) in zip(handles, places, strict=True):
        before = [taken[node, gpu] for gpu in gpus if (node, gpu) in taken]
        task = asyncio.ensure_future(after(before, handle))
        taken |= dict.fromkeys(((node, gpu) for gpu in gpus), task)
        loading.append(task)
    try:
        await asyncio.gather(*loading)
    finally:
        for task in loading:
            task.cancel()


def _frozen(
    infos: Mapping[str, Mapping[str, Any]], learners: Mapping[str, str], policy: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """See `Started.frozen`."""
    held = {name: (info, info["sha256"]) for name, info in infos.items()}
    held |= {name: (policy, digest) for name, digest in learners.items()}
    return {
        name: {"name": info["name"], "parameters": info["parameters"], "sha256_before": digest}
        for name, (info, digest) in held.items()
    }


async def join_ranks(fleet: Fleet, ranks: Sequence[Handle]) -> None:
    """Builds a learner from its placed but still empty ranks: they meet where rank 0 is."""
    host, port = await fleet.get(ranks[0].call("rendezvous"), "placing the learner", fleet.start_deadline_s)
    joins = [h.call("join", Rendezvous(rank, len(ranks), host, port)) for rank, h in enumerate(ranks)]
    await fleet.get_all(joins, "joining the learner's ranks", fleet.start_deadline_s)
