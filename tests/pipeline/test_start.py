"""A worker that dies while a run starts is told with what it printed, which is where an engine says why."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
import ray

from cluster.run.actors import ClusterError, join_cluster, leave_cluster, spawn
from cluster.run.faults import RayBackend
from cluster.run.fleet import Fleet
from cluster.run.recipe import Recipe
from cluster.run.recovery import RunError, unstarted


class Doomed:
    """Like a worker whose engine cannot run its model."""

    def load(self) -> None:
        """Dies as vLLM's do: the reason is in what another process printed."""
        print("(EngineCore pid=1) INFO 11-23 [core.py:1] loading", flush=True)
        print("(EngineCore pid=1) ERROR 11-23 [core.py:1] RuntimeError: head_dim=12 is not supported", flush=True)
        os._exit(1)

    def refuse(self) -> None:
        """Raises instead."""
        raise ValueError("this model has no end token")


def test_a_job_server_is_no_cluster_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match=r"^http://127.0.0.1:8265 .* takes runs by musketeers submit.*HOST:6379"):
        join_cluster(None, None, "test-start")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    join_cluster(None, None, "test-start")
    yield
    leave_cluster()


def said(method: str) -> str:
    """What a run that started this worker would end with."""
    worker = spawn(Recipe("Rollout(0)", Doomed, ()))
    fleet = Fleet([], [worker], [], [], 60.0, RayBackend(), 60.0)

    async def start() -> RunError:
        try:
            await fleet.get(worker.start_with(method), "loading")
        except fleet.backend.errors as error:
            return await unstarted(error, fleet)
        raise AssertionError("it started")

    try:
        return str(asyncio.run(start()))
    finally:
        ray.kill(worker.actor, no_restart=True)


def test_a_death_is_told_with_the_errors_of_its_log_and_nothing_else_that_was_printed(cluster: None) -> None:
    told = said("load")
    assert told.startswith("Rollout(0) died: ")
    assert "RuntimeError: head_dim=12 is not supported" in told
    assert "loading" not in told and "actor_name" not in told


def test_an_error_is_told_with_where_it_was_raised(cluster: None) -> None:
    told = said("refuse")
    assert told.startswith("Rollout(0) raised: ValueError: this model has no end token")
    assert "in refuse" in told
