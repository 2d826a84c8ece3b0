"""`musketeers serve`: a trained router's experts and policy as deployments of Ray Serve, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config import ConfigError
from cluster.run.asked import answer_tokens
from cluster.run.recipe import Recipe
from cluster.run.start import expert_recipes, rollout_recipes
from cluster.serve.keys import DIGEST, VARIABLE, api_key, digest
from cluster.serve.opening import Ready, ready
from experts.router import Asks, router_class

APPLICATION = "musketeers"
WATCH_S = 5.0
QUEUED = 1024  # requests that wait for a deployment; further ones are refused at once
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_READY_S = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"  # three such checks; on a busy machine its 5 s are too few


class ServeError(RuntimeError):
    """A server that could not start, or that has broken down; the message says why."""


@dataclass(frozen=True)
class Options:
    """How to serve.

    name: of the model, for clients; None takes the run's.
    address: of a running cluster; None starts one on loopback.
    most_policies, most_experts: replicas that Ray Serve may scale to (of each expert); None leaves their number as it
        is configured: `policy.workers`, `experts.N.replicas`.
    per_replica: requests at once that a replica is to have, by which Serve scales.
    expert_timeout_s: after which a request goes on without an expert.
    deadline_s: of a whole request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    key_file: Path | None = None
    address: str | None = None
    most_policies: int | None = None
    most_experts: int | None = None
    per_replica: int = 32
    expert_timeout_s: float = 5.0
    deadline_s: float = 600.0


def serve_trained(place: str, step: int | None, overrides: Sequence[str], options: Options, console: Console) -> None:
    """Serves a run or a bundle until it is interrupted.

    Raises:
        ValueError: one line, before anything starts.
        ServeError: when it cannot start.
    """
    key = api_key(options.key_file, options.host)
    if options.address is None:
        _check_free(options.host, options.port)
    opened = ready(place, step, overrides)
    _check_sizes(opened, options)
    os.environ.pop(VARIABLE, None)  # Ray's processes inherit the environment, and are told the digest only
    os.environ[DIGEST] = digest(key)
    os.environ[PROXY_CALLBACK] = "cluster.serve.keys.proxy_middlewares"
    os.environ.setdefault(PROXY_READY_S, "60")
    from cluster.run.actors import join_cluster, leave_cluster

    cluster = join_cluster(options.address, None, APPLICATION)
    try:
        _check_alone(options)
    except ConfigError:
        leave_cluster()
        raise
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        with console.status("starting the experts and the policy"):
            start(opened, options, key, stopped)
        if not stopped.is_set():
            _introduce(opened, options, key, cluster.dashboard_url, console)
        _watch(stopped, console)
    finally:
        console.print("stopping", highlight=False)
        _stop(cluster.started)
        leave_cluster()


def _check_free(host: str, port: int) -> None:
    """Refuses an address where nothing can listen, before models load."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ConfigError(
            f"--host {host}: nothing can listen on port {port} ({error.strerror}): give another --port"
        ) from None


def _check_sizes(opened: Ready, options: Options) -> None:
    """Refuses limits of replicas that leave nothing to scale."""
    config = opened.config
    experts = max(expert.replicas for expert in config.experts)
    for flag, most, there in [
        ("--max-policies", options.most_policies, config.policy.workers),
        ("--max-experts", options.most_experts, experts),
    ]:
        if most is not None and most < there:
            raise ConfigError(f"{flag} {most} is less than the {there} that the configuration starts with")


def _check_alone(options: Options) -> None:
    """Refuses a cluster whose Ray Serve listens elsewhere already, or has an application of ours.

    Raises:
        ConfigError: with what to do.
    """
    from ray import serve
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    there = client.http_config
    if (there.host, there.port) != (options.host, options.port):
        raise ConfigError(
            f"Ray Serve runs there already: give --host {there.host} --port {there.port}, where it listens, or end it "
            "with `serve shutdown`"
        )
    if APPLICATION in serve.status().applications:
        raise ConfigError("a router is served on that cluster already: end that server first")


def start(opened: Ready, options: Options, key: str | None, stopped: threading.Event) -> None:
    """Deploys, and returns when everything answers, or when `stopped` is set.

    Raises:
        ServeError: naming the deployment that does not start, and why.
    """
    from ray import serve
    from ray.exceptions import RayActorError, RayTaskError
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client
    from ray.serve.schema import LoggingConfig, ProxyStatus

    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    http = HTTPOptions(host=options.host, port=options.port)
    try:
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet)
    except RayTaskError as error:
        raise ServeError(f"Ray Serve cannot listen on {options.host}:{options.port}: {error.cause}") from error
    except (TimeoutError, RayActorError) as error:
        # A proxy that is not up within Serve's own minute is waited for below: the controller goes on starting it.
        if _get_global_client(raise_if_no_controller_running=False) is None:
            raise ServeError(f"Ray Serve does not start: {error}") from error
    target = serve.RunTarget(application(opened, options, key), name=APPLICATION, logging_config=quiet)
    serve.run_many([target], wait_for_applications_running=False)
    deadline = time.monotonic() + opened.config.ray.start_deadline_s
    while not stopped.wait(0.2):
        everything = serve.status()
        status = everything.applications[APPLICATION]
        listens = ProxyStatus.HEALTHY in everything.proxies.values()
        if status.status == "RUNNING" and listens:
            return
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ServeError(_why(status))
        if time.monotonic() > deadline:
            proxies = ", ".join(f"{proxy.value} on node {node}" for node, proxy in everything.proxies.items())
            where = f"{options.host}:{options.port}"
            raise ServeError(
                _why(status) if listens else f"Ray Serve does not listen on {where}: {proxies or 'no proxy'}"
            )


def application(opened: Ready, options: Options, key: str | None) -> Any:
    """The deployments, bound together."""
    from ray import serve

    from cluster.serve.ingress import Facts, ingress
    from cluster.serve.replicas import ExpertReplica, PolicyReplica

    config = opened.config
    asks: Asks = getattr(router_class(config.router.kind), "asks", "states")
    experts: dict[str, Any] = {}
    if asks != "nothing":
        fingerprints = opened.shape.expert_fingerprints
        for expert, recipes, fingerprint in zip(config.experts, expert_recipes(config), fingerprints, strict=True):
            deployed = serve.deployment(ExpertReplica).options(
                name=f"expert-{expert.name}", **_scaled(recipes[0], len(recipes), options.most_experts, options)
            )
            experts[expert.name] = deployed.bind(*recipes[0].args, fingerprint, expert.batch)
    policies = rollout_recipes(config)
    policy, path, router, _, _, threads, date = policies[0].args
    answering = serve.deployment(PolicyReplica).options(
        name="policy", **_scaled(policies[0], len(policies), options.most_policies, options)
    )
    facts = Facts(
        name=options.name or opened.trained.name,
        ready=opened,
        asks=asks,
        answer_tokens=answer_tokens(config),
        expert_timeout_s=options.expert_timeout_s,
        deadline_s=options.deadline_s,
        created=int(time.time()),
    )
    bound = answering.bind(
        policy, path, router, opened.shape, opened.trained.snapshot, threads, opened.trained.stand_ins, date
    )
    return ingress(digest(key)).options(ray_actor_options={"num_cpus": 0}).bind(facts, bound, experts)


def _scaled(recipe: Recipe, replicas: int, most: int | None, options: Options) -> dict[str, Any]:
    """A deployment's size and resources."""
    size: dict[str, Any] = {"num_replicas": replicas}
    if most is not None and most > replicas:
        scale = {
            "min_replicas": replicas,
            "max_replicas": most,
            "target_ongoing_requests": options.per_replica,
        }
        size = {"autoscaling_config": scale}
    return {
        **size,
        "max_ongoing_requests": 4 * options.per_replica,
        "max_queued_requests": QUEUED,
        "ray_actor_options": {"num_cpus": recipe.cpus, "num_gpus": recipe.gpus},
    }


def _introduce(opened: Ready, options: Options, key: str | None, dashboard: str | None, console: Console) -> None:
    url = f"http://{options.host}:{options.port}"
    name = options.name or opened.trained.name
    table = Table("", "", show_header=False, box=None)
    at_step = "" if opened.trained.step is None else f" after {opened.trained.step} steps"
    table.add_row("model", f"{name} ({opened.trained.place}{at_step})")
    table.add_row("experts", ", ".join(f"{e.name} ({e.engine})" for e in opened.config.experts))
    table.add_row("policy", f"{opened.config.policy.model} ({opened.config.policy.engine})")
    table.add_row("API", f"{url}/v1" + (" (with a key)" if key else ""))
    table.add_row("health", f"{url}/health")
    if dashboard:
        table.add_row("dashboard", f"http://{dashboard}")
    console.print(table)
    bearer = ' -H "Authorization: Bearer $MUSKETEERS_API_KEY"' if key else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "..."}}]}}'
    console.print(
        f"try: curl {url}/v1/chat/completions{bearer} -H 'content-type: application/json' -d '{body}'\nCtrl-C stops it",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _watch(stopped: threading.Event, console: Console) -> None:
    """Until `stopped`: says when something is wrong, and when it is right again."""
    from ray import serve

    before = "RUNNING"
    while not stopped.wait(WATCH_S):
        status = serve.status().applications.get(APPLICATION)
        now = "gone" if status is None else str(status.status.value)
        if now != before:
            ill = status is not None and now != "RUNNING"
            console.print(f"the application is {now}" + (f": {_why(status)}" if ill else ""), highlight=False)
        before = now


def _stop(own: bool) -> None:
    from ray import serve

    if own:
        serve.shutdown()
    else:
        serve.delete(APPLICATION)


def _why(status: Any) -> str:
    """What Serve says of deployments that are not well."""
    ill = [f"{name}: {each.message.strip()}" for name, each in status.deployments.items() if each.message]
    said = "\n".join(ill) or status.message or f"the application is {status.status}"
    lines = [line for line in said.splitlines() if line.strip()]
    return "\n".join(lines[-12:])
