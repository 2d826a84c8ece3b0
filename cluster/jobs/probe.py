"""Looks at a Ray cluster from inside and says what it found, as JSON: a process of its own, so that a cluster in any
state can neither hang the doctor nor end it.

Reads from its standard input: `address`, and `places` as `cluster.jobs.shared.places` gives them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import cluster.jobs.probe
import cluster.jobs.shared
from cluster.jobs.client import use_token_if_there_is_one
from cluster.jobs.cluster_checks import asks_no_token
from cluster.jobs.shared import look, marked
from cluster.run.environment import PROCESS_ENVIRONMENT

VERSIONS = ("ray", "torch", "transformers", "deepspeed")


def main() -> None:
    """Prints one JSON object: `nodes`, or `error`."""
    os.environ.update(PROCESS_ENVIRONMENT)
    asked = json.load(sys.stdin)
    use_token_if_there_is_one()
    from ray.exceptions import RayError

    try:
        found = _look_around(asked["address"], asked["places"])
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


def _look_around(address: str, places: Mapping[str, str]) -> dict[str, Any]:
    import ray

    from cluster.run.actors import alive_nodes, on_nodes

    # Nodes need nothing of ours for this: what they run travels with the call.
    for module in (cluster.jobs.probe, cluster.jobs.shared):
        ray.cloudpickle.register_pickle_by_value(module)
    context = ray.init(address=address, namespace="doctor", logging_level="ERROR", log_to_driver=False)
    nodes = alive_nodes()
    with marked(places.get("root")) as marker:
        facts = on_nodes(nodes, node_facts, dict(places), marker)
    free = ray._private.state.available_resources_per_node()
    url = context.dashboard_url
    return {
        "open": bool(url) and asks_no_token(url if "://" in url else f"http://{url}"),
        "nodes": [
            {
                "name": f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})",
                "total": {key: node["Resources"].get(key, 0.0) for key in ("CPU", "GPU")},
                "free": {key: free.get(node["NodeID"], {}).get(key, 0.0) for key in ("CPU", "GPU")},
                **said,
            }
            for node, said in zip(nodes, facts, strict=True)
        ],
    }


def node_facts(places: Mapping[str, str], marker: str) -> dict[str, Any]:
    """Runs on a node."""
    import psutil

    seen = look(places, marker)
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {
        "memory": psutil.virtual_memory().available,
        "unseen": list(seen.unseen),
        "unwritable": list(seen.unwritable),
        "versions": versions,
        "lacks": [tool for tool in ("python", "pip") if shutil.which(tool) is None],
    }


if __name__ == "__main__":
    main()
