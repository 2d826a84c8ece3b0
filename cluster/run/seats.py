"""Where in the cluster each worker belongs: bundles of placement groups, packed or spread as configured.

A bundle outlives its worker.  When a node is lost, Ray moves the node's bundles to others that have room, and the
workers' successors start there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.run.recipe import Recipe


class ClusterError(RuntimeError):
    """A cluster that cannot be joined or started, or has no room."""


async def reserve(
    role: str, recipes: Sequence[Recipe], strategy: str, limit_s: float, warn: Callable[[str], None]
) -> list[Any]:
    """Room for the workers of one role; for each worker, where Ray is to start it.

    Workers that ask for no CPU and no GPU need no bundle: Ray puts them on few nodes or on many.

    Args:
        role: such as `learner`, for people.
        strategy: `pack`, `spread`, `strict_pack` or `strict_spread`.
        limit_s: of the wait for room, which an autoscaler may have to make first.
        warn: tells people that there is none yet.

    Raises:
        ClusterError: when there is no room in time, with what is asked and what is free.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundles = [bundle for recipe in recipes if (bundle := _bundle(recipe))]
    anywhere = "SPREAD" if "spread" in strategy else "DEFAULT"
    if not bundles:
        return [anywhere] * len(recipes)
    group = placement_group(bundles, strategy=strategy.upper(), name=f"{role} {time.time_ns():x}")
    if not await asyncio.to_thread(group.wait, min(10.0, limit_s)):
        asked = f"the {role} asks for {_said(bundles)} ({strategy}); free now: {_said([ray.available_resources()])}"
        warn(f"waiting for room in the cluster: {asked}")
        if not await asyncio.to_thread(group.wait, limit_s):
            remove_placement_group(group)
            raise ClusterError(
                f"the cluster has no room after {limit_s:g} s: {asked}: add nodes, ask for less, or change "
                f"ray.placement.{role}"
            )
    numbers = iter(range(len(bundles)))
    return [
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=next(numbers))
        if _bundle(recipe)
        else anywhere
        for recipe in recipes
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
