"""Joining or starting a Ray cluster, and workers as actors.  Only this module, `seats` and `faults` know Ray."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from cluster.config import RunConfig
from cluster.jobs.placement import Node
from cluster.jobs.shared import Seen, check_shared, look
from cluster.run.environment import PROCESS_ENVIRONMENT
from cluster.run.faults import answer_stack_requests
from cluster.run.fleet import Reference
from cluster.run.recipe import Recipe
from cluster.run.seats import ClusterError
from experts.expert import Expert
from experts.loading import import_transformers
from experts.state import RouterShape
from learner.engine import Rendezvous, free_port, import_deepspeed
from learner.learner import LearnerRank, LearnerSpec
from rollout.types import Rollout
from rollout.worker import RolloutWorker

NODE_ANSWERS_S = 180.0  # its first task starts a process there, and installs what a job carries


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
    if address and address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} (ray.address or RAY_ADDRESS) is a job server, which takes runs by musketeers submit: to train "
            "from here, name the cluster itself (ray.address=HOST:6379), or unset it to start one on this machine"
        )
    environment = {"env_vars": dict(PROCESS_ENVIRONMENT)}  # a copy: Ray writes its hook into it, and refuses a second
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
                # Or else Ray would first try the last cluster that was started on this machine, dead or alive.
                "local",
                _node_ip_address="127.0.0.1",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=dashboard_port,
                **common,
            )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at {address!r}" if address else "a local Ray cluster"
        raise ClusterError(f"{where} cannot be reached: {' '.join(str(error).split())[:400]}") from error
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    return ClusterInfo(context.dashboard_url, not address, token)


def gpu_nodes(memory_gb: float | None) -> list[Node]:
    """The cluster's nodes with their GPUs, and how much memory each GPU has, as they say themselves.

    memory_gb: of every GPU, where it is known already.
    """
    nodes = [node for node in alive_nodes() if node["Resources"].get("GPU")]
    known = None if memory_gb is None else int(memory_gb * 2**30)
    memories = [known] * len(nodes) if known else on_nodes(nodes, _gpu_memory)
    return [
        Node(node["NodeManagerAddress"], int(node["Resources"]["GPU"]), memory)
        for node, memory in zip(nodes, memories, strict=True)
    ]


def alive_nodes() -> list[dict[str, Any]]:
    """The cluster's nodes, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def on_nodes(nodes: Sequence[dict[str, Any]], function: Any, *args: Any) -> list[Any]:
    """What a function says on each of these nodes.

    Raises:
        ClusterError: when a node does not answer.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(function)
    there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [ask.options(num_cpus=0, scheduling_strategy=place).remote(*args) for place in there]
    answers, deadline = [], time.monotonic() + NODE_ANSWERS_S
    for node, answer in zip(nodes, asked, strict=True):
        try:
            answers.append(ray.get(answer, timeout=max(0.1, deadline - time.monotonic())))
        except GetTimeoutError as error:
            raise ClusterError(f"node {_name(node)} gives no answer within {NODE_ANSWERS_S:g} s") from error
        except RayError as error:
            reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
            raise ClusterError(f"node {_name(node)} cannot run anything: {reason}") from error
    return answers


def check_places(config: RunConfig) -> None:
    """Refuses folders of the configuration that some node of the cluster does not see; see `check_shared`."""
    nodes = alive_nodes()

    def ask(wanted: Mapping[str, str], marker: str) -> list[Seen]:
        seen = on_nodes(nodes, look, wanted, marker)
        return [replace(answer, node=_name(node)) for node, answer in zip(nodes, seen, strict=True)]

    if len(nodes) > 1:
        check_shared(config, ask)


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _gpu_memory() -> int | None:
    """Bytes of the smallest GPU of this node; None when it has none that says so."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return min(int(line) for line in said.split()) * 2**20


def whereabouts() -> dict[str, tuple[str, int]]:
    """Node and process of this run's living actors, by the name they show."""
    import ray
    from ray.exceptions import RayError
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    here = ray.get_runtime_context().gcs_address
    mine = ("ray_namespace", "=", ray.get_runtime_context().namespace)
    try:
        found = list_actors(
            address=here, filters=[mine, ("state", "=", "ALIVE")], limit=1000, timeout=10, raise_on_missing_output=False
        )
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    except (RayStateApiException, RayError, OSError):
        return {}
    return {(actor.name or "").split(" #")[0]: (nodes.get(actor.node_id, ""), actor.pid or 0) for actor in found}


def leave_cluster() -> None:
    """Ends this process's connection, and the cluster if it was our own."""
    import ray

    ray.shutdown()


@dataclass
class RayHandle:
    """An actor, or its successor after `restart`: calls always go to the one that lives.

    place: where Ray is to start its processes.
    setup: calls that every fresh process needs before any other, in order.
    replaced: ids of the processes before this one.
    """

    recipe: Recipe
    concurrency: int = 1
    place: Any = "DEFAULT"
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

    def start_with(self, method: str, *args: Any, later: str | None = None) -> Reference:
        """A call now, and again first thing in every later process, there perhaps of another method."""
        self.setup.append((later or method, args))
        return self.call(method, *args)

    def restart(self) -> None:
        """Ends the process if it still lives, and starts another."""
        import ray

        ray.kill(self.actor, no_restart=True)
        self.replaced.append(self.actor_id)
        self.actor = _create(self)
        for method, args in self.setup:
            self.call(method, *args)


def spawn(recipe: Recipe, place: Any = "DEFAULT", concurrency: int = 1) -> RayHandle:
    """Starts an actor where `seats.reserve` says; calls to it wait until it is up."""
    return RayHandle(recipe, concurrency, place)


def _create(handle: RayHandle) -> Any:
    """Starts an actor's process.  The pipeline alone retries, never Ray."""
    import ray

    recipe = handle.recipe
    options: dict[str, Any] = {
        # The name of a process that has just ended may still be taken.
        "name": recipe.name + (f" #{handle.generation}" if handle.generation else ""),
        "num_cpus": recipe.cpus,
        "num_gpus": recipe.gpus,
        "scheduling_strategy": handle.place,
        "max_restarts": 0,
        "max_task_retries": 0,
        # Ray shows all GPUs of a machine to a worker that asked for none.
        "runtime_env": {"env_vars": PROCESS_ENVIRONMENT | ({} if recipe.gpus else {"CUDA_VISIBLE_DEVICES": ""})},
    }
    if handle.concurrency > 1:
        options["max_concurrency"] = handle.concurrency
    return ray.remote(recipe.kind).options(**options).remote(*recipe.args)


class Placed:
    """A worker in steps: placed first, and its model loaded when told, because engines that share a GPU must start
    one after the other.

    Calls may come from several threads; those that need the model wait for it.
    """

    def __init__(self, name: str, *arguments: Any) -> None:
        self._name, self._arguments, self._loaded = name, arguments, threading.Event()
        import_transformers()

    def __repr__(self) -> str:
        return self._name

    def place(self) -> tuple[str, tuple[str, ...]]:
        """The node it is on, and its GPUs there."""
        import ray

        return ray.get_runtime_context().get_node_id(), tuple(map(str, ray.get_gpu_ids()))

    def load(self) -> bool:
        """Builds the worker, while no other one loads on the same GPU of this machine."""
        _, gpus = self.place()
        with contextlib.ExitStack() as turns:
            for gpu in sorted(gpus):
                turns.enter_context(FileLock(Path(tempfile.gettempdir()) / f"musketeers-{os.getuid()}-gpu-{gpu}.lock"))
            super().__init__(*self._arguments)
        self._loaded.set()
        return True

    def reload(self) -> None:
        """`load` in a process that took a dead one's place: nobody waits for its outcome, so one that cannot load
        ends, is missed like the one before, and has its reason in its log."""
        try:
            self.load()
        except Exception:  # noqa: BLE001 - whatever a library raises when a model does not fit
            traceback.print_exc()
            print(f"{self._name}: cannot be loaded again, the worker ends", file=sys.stderr, flush=True)
            os._exit(1)

    def ready(self) -> bool:
        """Answers once the worker is built."""
        return self._loaded.wait()

    def engine_died(self) -> None:
        """A broken engine must not keep answering: the process ends, and the driver starts another."""
        print(f"{self._name}: its engine is gone, the worker ends", file=sys.stderr, flush=True)
        os._exit(1)


class ExpertActor(Placed, Expert):
    """An expert as an actor."""


class RolloutActor(Placed, RolloutWorker):
    """A rollout worker as an actor; with an engine that batches over calls, several run at once."""

    def __init__(self, name: str, *arguments: Any) -> None:
        super().__init__(name, *arguments)
        self._attached = threading.Event()

    def attach(self, shape: RouterShape) -> None:
        """See `RolloutWorker.attach`."""
        self._loaded.wait()
        super().attach(shape)
        self._attached.set()

    def generate(self, *arguments: Any, **settings: Any) -> Rollout:
        """See `RolloutWorker.generate`."""
        self._attached.wait()
        return super().generate(*arguments, **settings)

    def info(self) -> dict[str, Any]:
        """See `RolloutWorker.info`."""
        self._loaded.wait()
        return super().info()

    def sha256(self) -> str:
        """See `RolloutWorker.sha256`."""
        self._loaded.wait()
        return super().sha256()


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
