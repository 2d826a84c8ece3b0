"""What the doctor finds on a Ray cluster, and for a configuration: resources, models, folders, node by node."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from cluster.config import ConfigError, RunConfig
from cluster.jobs import placement
from cluster.jobs.client import JobError, Jobs
from cluster.jobs.findings import GIB, Check
from cluster.jobs.shared import places
from experts.loading import describe

PROBE_S = 240.0
WORKER_GIB = 0.7  # a process that has imported torch and transformers, with a small model
FIRST = "the first training"
ENGINE_GIB = 2.0  # vLLM's processes, without weights and cache


def look_inside(address: str, config: RunConfig | None) -> dict[str, Any]:
    """The cluster at an address: its nodes, or why they cannot be seen."""
    if not address.startswith("http"):
        return probe(address, config)
    try:
        jobs = Jobs(address)
        return {"jobs": len(jobs.list()), "open": asks_no_token(address)}
    except (JobError, OSError) as error:
        return {"error": str(error)}


def probe(address: str, config: RunConfig | None) -> dict[str, Any]:
    """What `cluster.jobs.probe` says."""
    asked = {"address": address, "places": places(config) if config else {}}
    command = [sys.executable, "-P", "-m", "cluster.jobs.probe"]
    try:
        said = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_S:g} s"}
    lines = [line for line in said.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"error": (said.stderr.strip().splitlines() or ["the probe ended without a word"])[-1]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def cluster_checks(found: Mapping[str, Any], config: RunConfig | None) -> list[Check]:
    """The checks of a cluster that was probed."""
    if "error" in found:
        line = " ".join(str(found["error"]).split())[:300]
        if "token" in line.lower() or "authentication" in line.lower():
            return [Check("token", False, line, "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's own")]
        return [Check("Ray cluster", False, line, "look at ray status there")]
    if "jobs" in found:
        said = f"{found['jobs']} jobs; for its nodes give Ray's own address (host:6379)"
        return [_token(found["open"]), Check("job server", True, said)]
    nodes: Sequence[Mapping[str, Any]] = found["nodes"]
    checks = [_token(found["open"]), Check("Ray cluster", True, f"{len(nodes)} nodes")]
    for node in nodes:
        if node["lacks"]:
            what, remedy = " and no ".join(node["lacks"]), "start Ray there from the activated environment"
            checks.append(Check(node["name"], False, f"no {what} on its PATH", remedy))
    for name in nodes[0]["versions"]:
        versions = sorted({node["versions"][name] for node in nodes})
        if len(versions) > 1:
            checks.append(Check(name, False, f"nodes have {', '.join(versions)}", "install one version everywhere"))
    if config is None:
        return checks
    checks += [_place(key, place, nodes) for key, place in places(config).items()]
    for kind, name in (("total", "resources"), ("free", "resources now")):
        gpus = [placement.Node(node["name"], int(node[kind]["GPU"]), known_memory(config)) for node in nodes]
        checks.append(resources(config, gpus, sum(node[kind]["CPU"] for node in nodes), name))
        if not checks[-1].ok:
            break
    return checks


def _token(is_open: bool) -> Check:
    if is_open:
        remedy = "start Ray everywhere with RAY_AUTH_MODE=token and one token"
        return Check("token", False, "the cluster asks nobody for a token: whoever reaches it can run code", remedy)
    return Check("token", True, "asked for, and accepted")


def asks_no_token(url: str) -> bool:
    """Whether a dashboard tells its jobs to somebody without a token."""
    import requests

    return requests.get(f"{url.rstrip('/')}/api/jobs/", timeout=30).status_code not in (401, 403)


def _place(key: str, place: str, nodes: Sequence[Mapping[str, Any]]) -> Check:
    """A folder that all nodes must see, and write where it is the runs'."""
    unseen = [node["name"] for node in nodes if key in node["unseen"]]
    unwritable = [node["name"] for node in nodes if key in node["unwritable"]]
    if unseen:
        return Check(key, False, f"{place} is not seen by {', '.join(unseen)}", "take a folder that all nodes share")
    if unwritable:
        return Check(key, False, f"{place} cannot be written by {', '.join(unwritable)}", "mend its rights there")
    return Check(key, True, f"{place} on {len(nodes)} nodes")


def config_checks(config: RunConfig) -> list[Check]:
    """Whether the models of a configuration are there."""
    from cluster.run.models import model_path
    from cluster.run.preflight import check_models, check_start
    from cluster.zoo import paths as zoo

    checks = []
    for key, reference in config.models().items():
        try:
            if not is_built(reference):
                how = "builds it" if zoo.is_zoo(reference) else "gets it, or musketeers fetch"
                checks.append(Check(key, True, f"{reference}: {FIRST} {how}"))
                continue
            found = describe(model_path(reference))
            checks.append(Check(key, True, f"{reference}: {found['architecture']}, {found['layers']} layers"))
        except (ValueError, OSError) as error:
            checks.append(Check(key, False, f"{reference}: {error}", "mend the path, or the model's folder"))
    if all(check.ok and FIRST not in check.detail for check in checks):
        try:
            check_models(config)
            check_start(config)
        except ValueError as error:
            checks.append(Check("configuration", False, str(error), "see its key"))
    return checks


def is_built(reference: str) -> bool:
    """Whether a model is there, if it is one that a run builds, fetches or converts by itself."""
    from cluster.run.models import is_missing

    return not is_missing(reference)


def local_resources(config: RunConfig) -> Check:
    """GPUs asked for against those of this machine."""
    import os

    import torch

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    said = min((torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus), default=None)
    here = placement.Node("this machine", len(gpus), known_memory(config) or said)
    return resources(config, [here], float(os.cpu_count() or 1))


def known_memory(config: RunConfig) -> int | None:
    """Bytes of every GPU, where the configuration says so; a run asks the cluster's machines otherwise."""
    return None if config.ray.gpu_memory_gb is None else int(config.ray.gpu_memory_gb * GIB)


def resources(config: RunConfig, nodes: Sequence[placement.Node], cpus: float, name: str = "resources") -> Check:
    """Whether what a configuration asks for fits."""
    asked = asked_for(config)
    gpus = sum(node.gpus for node in nodes)
    detail = f"{asked['GPU']:g} GPUs and {asked['CPU']:g} CPUs asked for; there are {gpus} and {cpus:g}"
    remedy = "ask for less (gpus, cpus, replicas, ranks), wait for others to end, or add nodes"
    if asked["CPU"] > cpus or asked["GPU"] > gpus:
        return Check(name, False, detail, remedy)
    try:
        placement.check(_needs(config), nodes)
    except (ConfigError, ValueError, OSError) as error:
        return Check(name, False, str(error), remedy)
    return Check(name, True, detail)


def asked_for(config: RunConfig) -> dict[str, float]:
    """CPUs and GPUs of all workers together."""
    from cluster.run.preflight import plan_rows

    rows = plan_rows(config)
    return {
        "CPU": sum(row.cpus * row.workers for row in rows),
        "GPU": sum(row.gpus * row.workers for row in rows),
    }


def _needs(config: RunConfig) -> list[placement.Need]:
    from cluster.run.preflight import model_facts

    if asked_for(config)["GPU"] == 0:
        return []
    return placement.needs(config, model_facts(config))


def memory_gib(config: RunConfig) -> float:
    """What a run takes of a machine's memory that hosts all of its workers, roughly."""
    engines = [e for e in config.engines().values() if e.engine == "vllm"]
    caches = sum(e.kv_cache_gb + ENGINE_GIB for e in engines if not e.gpus)
    if config.execution == "inline":
        return 2 * WORKER_GIB + caches
    experts = sum(expert.replicas for expert in config.experts)
    workers = experts + config.policy.workers + config.rewards.workers + config.learner.ranks + 1
    return WORKER_GIB * workers + caches


def nodes_table(found: Mapping[str, Any], config: RunConfig | None) -> Table:
    """Requested against available, node by node."""
    asked = asked_for(config) if config else None
    title = "the cluster's nodes"
    if asked:
        title += f"; the run asks for {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs in all"
    table = Table("node", title=title)
    for column in ("CPUs free", "of", "GPUs free", "of", "memory free, GiB"):
        table.add_column(column, justify="right")
    for node in found["nodes"]:
        numbers = [f"{node[kind][key]:g}" for key in ("CPU", "GPU") for kind in ("free", "total")]
        table.add_row(node["name"], *numbers, f"{node['memory'] / GIB:.1f}")
    return table
