"""Raw gradients of an update for every ZeRO stage, number of micro-batches and aggregation, on one rank of some.

Run as `python -m tests.learner.gradient_cases RANK WORLD PORT FOLDER`: FOLDER holds `policy` and `groups.pickle`, and
gets `rank-N.npz` with one array `stage/micro/aggregation/parameter` each.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from experts.state import Arrays, RouterSnapshot
from learner.algorithms import build_algorithm
from learner.batch import global_denominators, micro_batches
from learner.config import AlgorithmConfig
from learner.engine import OptimizerState, Rendezvous
from learner.learner import LearnerRank, LearnerState
from rollout.types import Group
from tests.learner.world import World, encode

CASES = [(stage, count, "sequence") for stage in (0, 1, 2) for count in (1, 3, 7)]
CASES += [(1, 3, "token"), (1, 3, "constant")]


def algorithm(aggregation: str) -> AlgorithmConfig:
    """GRPO with a KL term that matters, and a clip that acts on some tokens."""
    settings = {"aggregation": aggregation, "kl": {"coefficient": 0.3}, "eps_low": 0.05}
    if aggregation == "constant":
        settings["constant_length"] = 9
    return AlgorithmConfig.model_validate(settings)


def second_router(first: Arrays) -> Arrays:
    """A router a small step away, as an update would make."""
    rng = np.random.default_rng(5)
    return {name: (a + 0.02 * rng.standard_normal(a.shape)).astype(np.float32) for name, a in first.items()}


def at_version_one(learner: LearnerRank) -> LearnerState:
    """A learner's state with two routers, the second being trained."""
    first = learner.snapshot()
    second = RouterSnapshot.of(second_router(first.arrays), 1, 0)
    return LearnerState(second, OptimizerState(0, {}), {0: first, 1: second}, first.arrays)


def token_limit(groups: Sequence[Group], slots: int, count: int) -> int:
    """A limit that cuts the groups into exactly so many micro-batches."""
    sizes = range(1, 200 * len(groups))
    return next(limit for limit in sizes if len(list(micro_batches(groups, slots, limit))) == count)


def gradients(world: World, place: Rendezvous, groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Every case's gradients on this rank, before clipping."""
    found: dict[str, np.ndarray] = {}
    mine = groups[place.rank :: place.world]
    features = [list(e.features) for e in encode([g.prompt for g in mine])]
    for stage in (0, 1, 2):
        learner = world.learner(place, staleness=1, learner={"zero_stage": stage})
        start = at_version_one(learner)
        for count, aggregation in [(c, a) for s, c, a in CASES if s == stage]:
            learner.restore(start, 0)
            config = algorithm(aggregation)
            learner.gradient.algorithm = build_algorithm(config)
            learner.gradient.microbatch_tokens = token_limit(mine, world.router.latents, count)
            learner.backward(mine, features, global_denominators(groups, config.constant_length))
            for name, array in learner.engine.gradients().items():
                found[f"{stage}/{count}/{aggregation}/{name}"] = array
            learner.finish_update()
    return found


def main() -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    rank, size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    groups = pickle.loads((folder / "groups.pickle").read_bytes())
    found = gradients(World.of(folder / "policy"), Rendezvous(rank=rank, world=size, port=port), groups)
    np.savez(folder / f"rank-{rank}.npz", **found)  # type: ignore[arg-type]  # numpy reads a dict as flags
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
