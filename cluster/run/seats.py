"""Where in the cluster each worker belongs: bundles of placement groups, packed or spread as configured.

A bundle outlives its worker.  When a node is lost, Ray moves the node's bundles to others that have room, and the
workers' successors start there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.run.recipe import Recipe

WARN_S = 10.0


class ClusterError(RuntimeError):
    """A cluster that cannot be joined or started, or has no room."""


@dataclass(frozen=True)
class Claim:
    """Room that was asked for, for the workers of one role.

    group: Ray's placement group, None where none is needed.
    """

    role: str
    strategy: str
    recipes: Sequence[Recipe]
    group: Any


def claim(wanted: Mapping[str, tuple[Sequence[Recipe], str]]) -> dict[str, Claim]:
    """Asks for room for every role: all at once, so that no run holds a part while it waits for the rest, and what is
    to be packed before what is spread over what is left.

    Args:
        wanted: role, such as `learner` -> its workers, and `pack`, `spread`, `strict_pack` or `strict_spread`.
    """
    from ray.util.placement_group import placement_group

    def ask(role: str, recipes: Sequence[Recipe], strategy: str) -> Claim:
        bundles = [bundle for recipe in recipes if (bundle := _bundle(recipe))]
        name = f"{role} {time.time_ns():x}"
        group = placement_group(bundles, strategy=strategy.upper(), name=name) if bundles else None
        return Claim(role, strategy, recipes, group)

    packed_first = sorted(wanted.items(), key=lambda item: "spread" in item[1][1])
    return {role: ask(role, recipes, strategy) for role, (recipes, strategy) in packed_first}


async def seats(asked: Claim, limit_s: float, warn: Callable[[str], None]) -> list[Any]:
    """Waits for the room; for each worker, where Ray is to start it.

    Workers that ask for no CPU and no GPU need no bundle: Ray puts them on few nodes or on many.

    Args:
        limit_s: of the wait for room, which an autoscaler may have to make first.
        warn: tells people that there is none yet.

    Raises:
        ClusterError: when there is no room in time, with what is asked and what is free.
    """
    import ray
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    anywhere = "SPREAD" if "spread" in asked.strategy else "DEFAULT"
    if asked.group is None:
        return [anywhere] * len(asked.recipes)
    began, warned = time.monotonic(), False
    # Short waits: a thread that waits long would hold up the end of a run that is stopped meanwhile.
    while not await asyncio.to_thread(asked.group.wait, 1.0):
        waited = time.monotonic() - began
        if warned and waited < limit_s:
            continue
        bundles = [_bundle(recipe) for recipe in asked.recipes]
        said = (
            f"the {asked.role} asks for {_said(bundles)} ({asked.strategy}); "
            f"free now: {_said([ray.available_resources()])}"
        )
        if waited >= limit_s:
            remove_placement_group(asked.group)
            raise ClusterError(
                f"the cluster has no room after {limit_s:g} s: {said}: add nodes, ask for less, or change "
                f"ray.placement.{asked.role}"
            )
        if waited > WARN_S:
            warn(f"waiting for room in the cluster: {said}")
            warned = True
    numbers = iter(range(len(asked.recipes)))
    return [
        PlacementGroupSchedulingStrategy(asked.group, placement_group_bundle_index=next(numbers))
        if _bundle(recipe)
        else anywhere
        for recipe in asked.recipes
    ]


async def names_free(limit_s: float) -> None:
    """Waits until the run's namespace is empty: a run that has just been killed leaves it within seconds.

    Raises:
        ClusterError: when another job of the same run holds it.
    """
    from ray.util import list_named_actors

    deadline = time.monotonic() + limit_s
    while names := list_named_actors():
        if time.monotonic() > deadline:
            raise ClusterError(
                f"another job of this run is under way in the cluster: it has {', '.join(sorted(names)[:4])}; "
                "stop it, or give run=NAME"
            )
        await asyncio.sleep(0.5)


def _bundle(recipe: Recipe) -> dict[str, float]:
    asked = {"CPU": recipe.cpus, "GPU": recipe.gpus}
    return {name: amount for name, amount in asked.items() if amount}


def _said(resources: Sequence[dict[str, float]]) -> str:
    """The CPUs and GPUs of several bundles or nodes together."""
    sums = {name: sum(each.get(name, 0.0) for each in resources) for name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}s" for name, amount in sums.items())
