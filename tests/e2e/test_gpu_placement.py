"""Workers on a cluster that pretends to have eight GPUs: who is placed where, and what is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.state import list_actors

from cluster.config import ConfigError, RunConfig, parse
from cluster.jobs import placement
from cluster.run.actors import ExpertActor, RolloutActor, gpu_nodes, spawn
from cluster.run.environment import PROCESS_ENVIRONMENT
from cluster.run.fleet import Fleet
from cluster.run.preflight import model_facts
from cluster.run.start import expert_recipes, placed, rollout_recipes
from tests.models import make

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """One node with eight GPUs that are not there; its address, or Ray asks the last cluster of this machine."""
    ray.init(
        "local", num_gpus=8, _node_ip_address="127.0.0.1", include_dashboard=True, dashboard_host="127.0.0.1",
        log_to_driver=False, runtime_env={"env_vars": PROCESS_ENVIRONMENT},
    )  # fmt: skip
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def config(folder: Path, **policy: Any) -> RunConfig:
    """Three experts on one GPU, a fourth split over two in two copies, and a policy with a GPU to itself."""
    model = {"model": str(folder), "engine": "vllm"}
    shares = [{"gpus": 0.25}, {"gpus": 0.25}, {"gpus": 0.5}, {"tensor_parallel": 2, "replicas": 2}]
    return parse(
        {
            "run": "placement",
            "steps": 1,
            "data": {"tasks": [{"name": "t", "dataset": "chain_sum"}]},
            "experts": [{"name": f"e{index}", **model, **share} for index, share in enumerate(shares)],
            "policy": {**model, "gpus": 1, **policy},
        },
        "test",
    )


def test_workers_are_placed_as_asked(cluster: str, tmp_path: Path) -> None:
    made = config(make(tmp_path / "model", "qwen2", width=128))
    placement.check(placement.needs(made, model_facts(made)), gpu_nodes(None))
    recipes = [recipe for copies in expert_recipes(made) for recipe in copies]
    handles = [spawn(placed(ExpertActor, recipe)) for recipe in recipes]
    handles += [spawn(placed(RolloutActor, recipe)) for recipe in rollout_recipes(made)]
    fleet = Fleet(handles, [], [], [], 200.0)
    places = asyncio.run(fleet.get_all([handle.call("place") for handle in handles], "placing"))
    gpus = {handle.name: ids for handle, (_, ids) in zip(handles, places, strict=True)}
    assert {name: len(ids) for name, ids in gpus.items()} == {
        "Expert(e0)": 1, "Expert(e1)": 1, "Expert(e2)": 1,
        "Expert(e3, replica 0)": 2, "Expert(e3, replica 1)": 2, "Rollout(0)": 1,
    }  # fmt: skip
    load = Counter[str]()
    for handle in handles:
        for gpu in gpus[handle.name]:
            load[gpu] += handle.recipe.gpus / len(gpus[handle.name])
    assert sorted(load.values()) == [1.0] * 6, "some GPU has more than it can give, or shares are spread"
    assert gpus["Expert(e0)"] == gpus["Expert(e1)"] == gpus["Expert(e2)"]
    said = {actor.name: actor.required_resources for actor in list_actors(cluster, detail=True)}
    asked = {name: resources["GPU"] for name, resources in said.items()}
    assert asked == {
        "Expert(e0)": 0.25, "Expert(e1)": 0.25, "Expert(e2)": 0.5,
        "Expert(e3, replica 0)": 2.0, "Expert(e3, replica 1)": 2.0, "Rollout(0)": 1.0,
    }  # fmt: skip
    for handle in handles:
        ray.kill(handle.actor)


def test_more_than_the_cluster_has_is_refused(cluster: str, tmp_path: Path) -> None:
    made = config(make(tmp_path / "model", "qwen2", width=128), replicas=4)
    with pytest.raises(ConfigError, match=r"ask for 9 GPUs .* and the cluster has 8"):
        placement.check(placement.needs(made, model_facts(made)), gpu_nodes(None))
    with pytest.raises(ConfigError, match=r"experts.0: Expert\(e0\) needs .* raise experts.0.gpus"):
        made = config(make(tmp_path / "other", "qwen2", width=128))
        placement.check(placement.needs(made, model_facts(made)), gpu_nodes(0.5))
