"""A server is up when its deployments run and its proxy listens, however long Ray Serve's proxy takes."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import context
from ray.serve.schema import ProxyStatus

from cluster.serve import serving
from cluster.serve.serving import APPLICATION, Options, ServeError, start


def given(
    monkeypatch: pytest.MonkeyPatch, proxies: list[ProxyStatus], application: str = "RUNNING"
) -> list[ProxyStatus]:
    """A Ray Serve whose own start times out, and whose proxy has these states one after the other, then the last."""
    asked: list[ProxyStatus] = []

    def slow(**_: Any) -> None:
        raise TimeoutError("HTTP proxies not available after 60s.")

    def status() -> Any:
        asked.append(proxies[min(len(asked), len(proxies) - 1)])
        ours = SimpleNamespace(status=application, deployments={}, message="why")
        return SimpleNamespace(applications={APPLICATION: ours}, proxies={"node": asked[-1]})

    monkeypatch.setattr(serve, "start", slow)
    monkeypatch.setattr(context, "_get_global_client", lambda **_: object())
    monkeypatch.setattr(serve, "run_many", lambda *_, **__: None)
    monkeypatch.setattr(serve, "RunTarget", lambda *_, **__: None)
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(serving, "application", lambda *_: None)
    return asked


def started(start_deadline_s: float = 600.0) -> None:
    opened: Any = SimpleNamespace(config=SimpleNamespace(ray=SimpleNamespace(start_deadline_s=start_deadline_s)))
    start(opened, Options(), None, threading.Event())


def test_a_proxy_that_is_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = given(monkeypatch, [ProxyStatus.STARTING, ProxyStatus.UNHEALTHY, ProxyStatus.HEALTHY])
    started()
    assert asked == [ProxyStatus.STARTING, ProxyStatus.UNHEALTHY, ProxyStatus.HEALTHY]


def test_one_that_never_listens_is_named_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, [ProxyStatus.STARTING])
    with pytest.raises(ServeError, match=r"does not listen on 127.0.0.1:8000: STARTING on node node"):
        started(start_deadline_s=0.0)


def test_a_controller_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, [ProxyStatus.HEALTHY])
    monkeypatch.setattr(context, "_get_global_client", lambda **_: None)
    with pytest.raises(ServeError, match="does not start: HTTP proxies not available"):
        started()


def test_an_address_where_it_cannot_listen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, [ProxyStatus.HEALTHY])

    def taken(**_: Any) -> None:
        raise RayTaskError("ready", "trace", OSError("address already in use")).as_instanceof_cause()

    monkeypatch.setattr(serve, "start", taken)
    with pytest.raises(ServeError, match=r"cannot listen on 127.0.0.1:8000: address already in use"):
        started()


def test_a_deployment_that_fails_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, [ProxyStatus.STARTING], "DEPLOY_FAILED")
    with pytest.raises(ServeError, match="why"):
        started()
