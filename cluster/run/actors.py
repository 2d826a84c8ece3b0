"""Joining or starting a Ray cluster, and workers as actors.  Only this module and `faults.py` know Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from cluster.run.environment import PROCESS_ENVIRONMENT
from cluster.run.faults import answer_stack_requests
from cluster.run.fleet import Reference
from cluster.run.recipe import Recipe
from experts.loading import import_transformers
from learner.engine import Rendezvous, free_port, import_deepspeed
from learner.learner import LearnerRank, LearnerSpec


class ClusterError(RuntimeError):
    """A cluster that cannot be joined or started."""


@dataclass(frozen=True)
class ClusterInfo:
    """The cluster a run lives in.  `started` tells one of our own from one that was joined."""

    dashboard_url: str | None
    started: bool
    token_path: str


def join_cluster(address: str | None, dashboard_port: int | None, namespace: str) -> ClusterInfo:
    """Joins the cluster at `address` (or RAY_ADDRESS), else starts one on loopback with its dashboard.

    Raises:
        ClusterError: naming the address that does not answer.
    """
    os.environ.update(PROCESS_ENVIRONMENT)
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    environment = {"env_vars": PROCESS_ENVIRONMENT}
    common: dict[str, Any] = {
        "namespace": namespace,
        "logging_level": "WARNING",
        "log_to_driver": False,
        "runtime_env": {**environment, "worker_process_setup_hook": answer_stack_requests},
    }
    try:
        if address:
            context = ray.init(address=address, **common)
        else:
            context = ray.init(
                _node_ip_address="127.0.0.1",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=dashboard_port,
                **common,
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at {address!r}" if address else "a local Ray cluster"
        raise ClusterError(f"{where} cannot be reached: {str(error).splitlines()[0]}") from error
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    return ClusterInfo(context.dashboard_url, not address, token)


def leave_cluster() -> None:
    """Ends this process's connection, and the cluster if it was our own."""
    import ray

    ray.shutdown()


@dataclass
class RayHandle:
    """An actor, or its successor after `restart`: calls always go to the one that lives.

    setup: calls that every fresh process needs before any other, in order.
    replaced: ids of the processes before this one.
    """

    recipe: Recipe
    concurrency: int = 1
    setup: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    actor: Any = None

    def __post_init__(self) -> None:
        self.actor = _create(self)

    @property
    def name(self) -> str:
        """The worker's name, the same for all its generations."""
        return self.recipe.name

    @property
    def generation(self) -> int:
        """How many processes this worker has had before the present one."""
        return len(self.replaced)

    @property
    def actor_id(self) -> str:
        """Ray's id of the present process, in hex."""
        return self.actor._actor_id.hex()

    def call(self, method: str, *args: Any, returns: int = 1, **kwargs: Any) -> Reference:
        """Starts a method; gives its reference, or one for each of several values."""
        return getattr(self.actor, method).options(num_returns=returns).remote(*args, **kwargs)

    def start_with(self, method: str, *args: Any) -> Reference:
        """A call now, and again first thing in every later process."""
        self.setup.append((method, args))
        return self.call(method, *args)

    def restart(self) -> None:
        """Ends the process if it still lives, and starts another."""
        import ray

        ray.kill(self.actor, no_restart=True)
        self.replaced.append(self.actor_id)
        self.actor = _create(self)
        for method, args in self.setup:
            self.call(method, *args)


def spawn(recipe: Recipe, concurrency: int = 1) -> RayHandle:
    """Starts an actor; calls to it wait until it is up."""
    return RayHandle(recipe, concurrency)


def _create(handle: RayHandle) -> Any:
    """Starts an actor's process.  The pipeline alone retries, never Ray."""
    import ray

    recipe = handle.recipe
    options: dict[str, Any] = {
        # The name of a process that has just ended may still be taken.
        "name": recipe.name + (f" #{handle.generation}" if handle.generation else ""),
        "num_cpus": recipe.cpus,
        "num_gpus": recipe.gpus,
        "max_restarts": 0,
        "max_task_retries": 0,
        "runtime_env": {"env_vars": PROCESS_ENVIRONMENT},
    }
    if handle.concurrency > 1:
        options["max_concurrency"] = handle.concurrency
    return ray.remote(recipe.kind).options(**options).remote(*recipe.args)


class LearnerActor(LearnerRank):
    """A learner rank in steps: placed while the other workers start, told what it is, joined with its fellows."""

    def __init__(self, index: int) -> None:
        import_deepspeed()
        import_transformers()
        self.place = Rendezvous(rank=index)

    def configure(self, spec: LearnerSpec) -> None:
        """What `join` will build."""
        self.spec = spec

    def rendezvous(self) -> tuple[str, int]:
        """This actor's address and a free port on its node."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def join(self, place: Rendezvous) -> bool:
        """Builds the rank."""
        super().__init__(self.spec, place)
        return True
