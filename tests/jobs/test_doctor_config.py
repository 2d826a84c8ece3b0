"""The doctor on a recipe: what it asks for against what this machine, or a cluster, has."""

from __future__ import annotations

import io
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from rich.console import Console

from cluster.config import load
from cluster.jobs import cluster_checks, doctor
from experts import vllm_install
from tests.models import make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that all roles take."""
    return make(tmp_path_factory.mktemp("doctor") / "model", "qwen2")


def visit(model: Path, root: Path, *overrides: str, address: str | None = None) -> tuple[int, str]:
    """The doctor's exit status, and what it printed on one line."""
    models = [f"{key}={model}" for key in ("experts.0.model", "experts.1.model", "policy.model")]
    config = load(ROOT / "configs" / "quickstart.yaml", [f"root={root}", *models, *overrides])
    console = Console(file=io.StringIO(), width=240)
    status = doctor.examine(config, root, root / "zoo", address, console)
    assert isinstance(console.file, io.StringIO)
    return status, " ".join(console.file.getvalue().split())


def test_a_recipe_that_this_machine_can_run(model: Path, tmp_path: Path) -> None:
    status, said = visit(model, tmp_path)
    assert status == 0, said
    assert "policy.model ok" in said and "resources ok 0 GPUs and 0 CPUs asked for" in said


def test_no_ray(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    status, said = visit(model, tmp_path, address=f"127.0.0.1:{port}")
    assert status == 1 and "Ray FAIL" in said and "ray start --head" in said


def test_a_wrong_vllm(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_install, "version", lambda: "0.31.0+cpu")
    status, said = visit(model, tmp_path)
    assert status == 1 and "vLLM FAIL 0.31.0+cpu" in said and "make install-vllm" in said


def test_too_little_memory(model: Path, tmp_path: Path) -> None:
    status, said = visit(model, tmp_path, "rewards.workers=100000")
    assert status == 1 and "memory FAIL" in said and "a run wants 70" in said


def test_a_run_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, said = visit(model, tmp_path / "file" / "runs")
    assert status == 1 and "runs folder FAIL" in said


def test_more_gpus_than_there_are(model: Path, tmp_path: Path) -> None:
    status, said = visit(model, tmp_path, "policy.gpus=1", "policy.workers=4000")
    assert status == 1 and "resources FAIL 4000 GPUs and 0 CPUs asked for" in said


def test_a_model_that_is_not_there(model: Path, tmp_path: Path) -> None:
    status, said = visit(model, tmp_path, f"experts.1.model={tmp_path}/nowhere")
    assert status == 1 and "experts.1.model FAIL" in said and "nowhere" in said


def node(name: str, **changed: Any) -> dict[str, Any]:
    """What a probe says of one node."""
    return {
        "name": name, "total": {"CPU": 8.0, "GPU": 2.0}, "free": {"CPU": 8.0, "GPU": 1.0}, "memory": 2**34,
        "unseen": [], "unwritable": [], "lacks": [], "versions": {"torch": "2.13.0"}, **changed,
    }  # fmt: skip


def test_what_ails_a_node_is_said_of_that_node(model: Path, tmp_path: Path) -> None:
    config = load(ROOT / "configs" / "quickstart.yaml", [f"root={tmp_path}", f"policy.model={model}"])
    nodes = [
        node("a"),
        node("b", unseen=["policy.model"]),
        node("c", unwritable=["root"], versions={"torch": "2.12.0"}),
        node("d", lacks=["pip"]),
    ]
    found = {check.name: check for check in cluster_checks.cluster_checks({"nodes": nodes, "open": False}, config)}
    assert {name for name, check in found.items() if not check.ok} == {"policy.model", "root", "torch", "d"}
    assert found["policy.model"].detail.endswith("is not seen by b")
    assert found["root"].detail.endswith("cannot be written by c")
    assert found["torch"].detail == "nodes have 2.12.0, 2.13.0" and "no pip on its PATH" in found["d"].detail
    table = Console(file=io.StringIO(), width=200, record=True)
    table.print(cluster_checks.nodes_table({"nodes": nodes}, config))
    assert "asks for 0 CPUs and 0 GPUs" in table.export_text()


@pytest.mark.parametrize(
    ("error", "name"),
    [("AuthenticationError: Invalid token", "token"), ("ConnectionError: no route to host", "Ray cluster")],
)
def test_a_cluster_that_cannot_be_seen(error: str, name: str) -> None:
    (check,) = cluster_checks.cluster_checks({"error": error}, None)
    assert check.name == name and not check.ok and check.remedy


@pytest.mark.parametrize(("status", "is_open"), [(200, True), (401, False)])
def test_a_cluster_that_asks_nobody_for_a_token_is_noticed(status: int, is_open: bool) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert cluster_checks.asks_no_token(f"http://127.0.0.1:{server.server_port}/") == is_open
    finally:
        server.shutdown()
    (token, _) = cluster_checks.cluster_checks({"nodes": [node("a")], "open": is_open}, None)
    assert token.name == "token" and token.ok != is_open


def test_gpus_that_others_hold_are_not_there(model: Path, tmp_path: Path) -> None:
    config = load(ROOT / "configs" / "quickstart.yaml", [f"policy.model={model}", "policy.gpus=1", "policy.workers=2"])
    checks = cluster_checks.cluster_checks({"nodes": [node("a")], "open": False}, config)
    found = {check.name: check for check in checks}
    assert found["resources"].ok and not found["resources now"].ok


@pytest.mark.parametrize(("gib", "fits"), [(80, True), (0.5, False)])
def test_gpus_too_small_for_a_model_are_a_finding(model: Path, gib: float, fits: bool) -> None:
    models = [f"{key}={model}" for key in ("experts.0.model", "experts.1.model", "policy.model")]
    asked = [*models, "policy.gpus=1", f"ray.gpu_memory_gb={gib}"]
    config = load(ROOT / "configs" / "quickstart.yaml", asked)
    checks = cluster_checks.cluster_checks({"nodes": [node("a")], "open": False}, config)
    (resources,) = [check for check in checks if check.name == "resources"]
    assert resources.ok == fits and ("policy: Rollout needs" in resources.detail) != fits


def test_a_recipe_that_cannot_be_read_is_a_finding_too(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cluster.cli import app

    (tmp_path / "latin.yaml").write_bytes(b"run: caf\xe9")
    for path in (tmp_path / "missing.yaml", tmp_path / "latin.yaml"):
        said = CliRunner().invoke(app, ["doctor", str(path)])
        assert said.exit_code == 1 and path.name in said.output
