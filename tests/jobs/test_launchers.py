"""The launchers, as far as they can be tested without Kubernetes, AWS and Slurm."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.autoscaler
import typer
import yaml
from jsonschema import Draft7Validator, Draft202012Validator, ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.cli import app
from cluster.config import load

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "cluster" / "jobs" / "launchers"
MANIFEST, CLUSTER_FILE, SLURM = (LAUNCHERS / name for name in ("kuberay-rayjob.yaml", "ray-up.yaml", "slurm.sh"))
DOCKERFILE = LAUNCHERS / "Dockerfile"
SCHEMA = Path(__file__).parent / "schemas" / "rayjob-v1.json.gz"


def strict(schema: Any) -> Any:
    """A CRD's schema that also refuses keys it does not know, as Kubernetes' strict field validation does."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def at(tree: Any, path: str) -> Any:
    """What stands at a dotted path."""
    for part in path.split("."):
        tree = tree[int(part) if isinstance(tree, list) else part]
    return tree


@pytest.fixture(scope="module")
def rayjob_schema() -> Draft202012Validator:
    schema = strict(json.loads(gzip.decompress(SCHEMA.read_bytes())))
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def cluster_schema() -> Draft7Validator:
    path = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    return Draft7Validator(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return documents()[0]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8"))


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The manifest's job and its ConfigMap; copied, because the job's pods share parts."""
    job, recipe = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return json.loads(json.dumps(job)), recipe


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    spec = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(documents()[1]["data"]["recipe.yaml"])
    return path


# KubeRay


def test_the_manifest_is_a_rayjob(rayjob: dict[str, Any], rayjob_schema: Draft202012Validator) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    rayjob_schema.validate(rayjob)


HEAD = "spec.rayClusterSpec.headGroupSpec"
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("path", "key", "value", "message"),
    [
        ("spec", "entryPoint", "true", "'entryPoint' was unexpected"),
        ("spec.rayClusterSpec.authOptions", "mod", "token", "'mod' was unexpected"),
        (f"{HEAD}.template.spec", "terminationGracePeriod", 9, "'terminationGracePeriod' was unexpected"),
        (f"{WORKER}.template.spec.containers.0.volumeMounts.0", "mountpath", "/x", "'mountpath' was unexpected"),
        (f"{WORKER}.template.spec.volumes.2.emptyDir", "sizelimit", "1Gi", "'sizelimit' was unexpected"),
        (f"{WORKER}.template.spec.containers.0.lifecycle.preStop.exec", "args", [], "'args' was unexpected"),
        ("spec", "backoffLimit", "ten", "'ten' is not of type 'integer'"),
        (WORKER, "replicas", "1", "'1' is not of type 'integer'"),
        (f"{HEAD}.rayStartParams", "num-gpus", 0, "0 is not of type 'string'"),
        (f"{WORKER}.template.spec.containers.0.resources.limits", "cpu", "8 cores", "'8 cores' does not match"),
        ("spec.rayClusterSpec.authOptions", "mode", "tokens", "'tokens' is not one of"),
    ],
)
def test_misspelt_keys_and_wrong_values_are_refused(
    rayjob: dict[str, Any], rayjob_schema: Draft202012Validator, path: str, key: str, value: Any, message: str
) -> None:
    at(rayjob, path)[key] = value
    with pytest.raises(ValidationError, match=message):
        rayjob_schema.validate(rayjob)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("spec.rayClusterSpec", "headGroupSpec"),
        (WORKER, "groupName"),
        (WORKER, "template"),
        (f"{WORKER}.template.spec", "containers"),
        (f"{HEAD}.template.spec.containers.0.env.0", "name"),
    ],
)
def test_missing_required_keys_are_refused(
    rayjob: dict[str, Any], rayjob_schema: Draft202012Validator, path: str, key: str
) -> None:
    del at(rayjob, path)[key]
    with pytest.raises(ValidationError, match=f"'{key}' is a required property"):
        rayjob_schema.validate(rayjob)


def test_what_the_manifest_refers_to_is_there(rayjob: dict[str, Any]) -> None:
    """Names that no schema can follow: volumes, the ConfigMap, the recipe's path, the versions."""
    config_map = documents()[1]
    for pod in pods(rayjob):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/recipes"]["configMap"]["name"] == config_map["metadata"]["name"]
        assert mounts["/shared"]["persistentVolumeClaim"] and mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert {"name": "MUSKETEERS_ZOO", "value": "/shared/zoo"} in pod["containers"][0]["env"]
    assert f"/recipes/{next(iter(config_map['data']))} " in rayjob["spec"]["entrypoint"]


def test_versions_are_those_of_the_project(rayjob: dict[str, Any], cluster: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    pinned = re.search(r"^ray==(.+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert pinned and rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pinned[1]
    assert f"'ray[default]=={pinned[1]}'" in CLUSTER_FILE.read_text()
    images = {pod["containers"][0]["image"] for pod in pods(rayjob)}
    assert images == {f"ghcr.io/your-org/n-musketeers:{version}"}
    assert f"--tag {images.pop()} " in DOCKERFILE.read_text()
    wheel = f"n_musketeers-{version}-py3-none-any.whl"
    assert f"dist/{wheel}" in cluster["file_mounts"].values() and f"dist/{wheel}" in DOCKERFILE.read_text()


def test_only_the_workers_have_gpus_and_the_recipe_needs_no_more(rayjob: dict[str, Any], tmp_path: Path) -> None:
    head, worker = (pod["containers"][0]["resources"]["limits"] for pod in pods(rayjob))
    assert at(rayjob, HEAD)["rayStartParams"]["num-gpus"] == "0" and "nvidia.com/gpu" not in head
    config = load(recipe(tmp_path))
    wanted = (
        sum(expert.gpus * expert.replicas for expert in config.experts)
        + config.policy.gpus * config.policy.workers
        + config.learner.gpus * config.learner.ranks
    )
    assert 0 < wanted <= at(rayjob, WORKER)["replicas"] * int(worker["nvidia.com/gpu"])


def test_a_stop_leaves_time_for_a_checkpoint_and_a_retry_goes_on(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["backoffLimit"] > 0 and "--auto-resume" in rayjob["spec"]["entrypoint"]
    for pod in pods(rayjob):
        wait = next(e["value"] for e in pod["containers"][0]["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
        assert pod["terminationGracePeriodSeconds"] > int(wait) >= 300


def pre_stop(pod: dict[str, Any]) -> str:
    program, option, code = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, option) == ("python", "-c")
    return code


def test_the_head_stops_the_driver_alone_and_waits_for_it(
    rayjob: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, saved = tmp_path / "musketeers", tmp_path / "checkpoint"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.5)\n"
        f"    pathlib.Path({str(saved)!r}).touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\nprint('up', flush=True)\ntime.sleep(60)\n"
    )
    script.chmod(0o755)
    started = [subprocess.Popen([script, word], stdout=subprocess.PIPE) for word in ("train", "doctor")]
    try:
        for process in started:
            assert process.stdout and process.stdout.readline() == b"up\n"
        # Only these two: a real run on this machine is none of the test's business.
        everything, own = psutil.process_iter, {process.pid for process in started}
        monkeypatch.setattr(psutil, "process_iter", lambda attrs: [p for p in everything(attrs) if p.pid in own])
        exec(pre_stop(pods(rayjob)[0]), {})
        assert saved.exists() and started[1].poll() is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_worker_stays_until_the_head_has_left(rayjob: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        worker = socket.create_connection(("127.0.0.1", port))
        accepted, _ = head.accept()
    code = pre_stop(pods(rayjob)[1]).replace("6379", str(port))
    assert str(port) in code
    with worker:
        waiting = threading.Thread(target=exec, args=(code, {}), daemon=True)
        waiting.start()
        waiting.join(2)
        assert waiting.is_alive()
        accepted.close()
        waiting.join(10)
        assert not waiting.is_alive()


# ray up


def test_the_cluster_file_is_one_for_ray(cluster: dict[str, Any], cluster_schema: Draft7Validator) -> None:
    cluster_schema.validate(cluster)
    validate_config(prepare_config(deepcopy(cluster)))  # and what Ray checks beside its schema


@pytest.mark.parametrize(
    ("path", "key", "value", "message"),
    [
        ("auth", "ssh_usr", "ubuntu", "'ssh_usr' was unexpected"),
        ("available_node_types.gpu", "min_worker", 1, "'min_worker' was unexpected"),
        ("available_node_types.gpu.resources", "GPU", "8", "'8' is not of type 'integer'"),
        ("available_node_types.head", "node_config", None, "None is not of type 'object'"),
    ],
)
def test_a_cluster_file_with_mistakes_is_refused(
    cluster: dict[str, Any], cluster_schema: Draft7Validator, path: str, key: str, value: Any, message: str
) -> None:
    at(cluster, path)[key] = value
    with pytest.raises(ValidationError, match=message):
        cluster_schema.validate(cluster)


def test_a_cluster_file_without_a_provider_is_refused(cluster: dict[str, Any], cluster_schema: Draft7Validator) -> None:
    del cluster["provider"]
    with pytest.raises(ValidationError, match="'provider' is a required property"):
        cluster_schema.validate(cluster)


def test_every_machine_gets_the_token_and_starts_ray_with_it(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    started = [c for key in ("head", "worker") for c in cluster[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(started) == 2
    assert all("RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 ray start" in command for command in started)


@pytest.mark.parametrize("stage", ["initialization", "setup", "head_setup", "head_start_ray", "worker_start_ray"])
def test_the_commands_are_shell(cluster: dict[str, Any], stage: str) -> None:
    for command in cluster[f"{stage}_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


# All of them


@pytest.mark.parametrize("launcher", [MANIFEST, CLUSTER_FILE, SLURM], ids=lambda path: path.name)
def test_the_commands_are_ones_that_the_program_has(launcher: Path, tmp_path: Path) -> None:
    text = launcher.read_text(encoding="utf-8").replace("\\\n", " ").replace('"$@"', "")
    found = re.findall(r"(?<![\w`-])musketeers (train [^'&#\n]+)", text)
    assert found
    group = typer.main.get_command(app)
    for line in found:
        name, *words = shlex.split(line)
        command = group.commands[name]  # type: ignore[attr-defined]
        given = command.make_context(name, list(words)).params  # click refuses options that are unknown
        assert given["auto_resume"]
        assert any(word.startswith("root=") for word in words)
        load(recipe(tmp_path), given["overrides"])


def test_token_authentication_is_on_everywhere_and_no_dashboard_is_open(rayjob: dict[str, Any]) -> None:
    assert rayjob["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert at(rayjob, HEAD)["serviceType"] == "ClusterIP"
    # KubeRay cannot do without this one, and says why beside it; it is open to the cluster's pods alone.
    params = at(rayjob, HEAD)["rayStartParams"]
    assert params.pop("dashboard-host") == "0.0.0.0" and "0.0.0.0" not in json.dumps(rayjob)
    for launcher in (CLUSTER_FILE, SLURM):
        text = launcher.read_text(encoding="utf-8")
        assert "0.0.0.0" not in text and "--dashboard-host=127.0.0.1" in text and "RAY_AUTH_MODE=token" in text


# Slurm


def test_the_script_is_shell_and_its_directives_come_first() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    code = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives and max(directives) < code, "sbatch reads none behind the first command"
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@300"} <= set(lines)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The script on an allocation of two machines that are both this one; Ray is real, Slurm and the driver are not."""
    fakes = {
        # A step starts its command behind the options that it was given.
        "srun": 'while [[ $1 == --* ]]; do shift; done; [[ $* == *--head* ]] || set -- "$@" '
        '--node-ip-address=127.0.0.1; exec "$@"',
        "scontrol": f'[[ $1 == show ]] && {{ echo a; sleep 0.2; echo b; }} || echo "$@" >>{tmp_path}/requeued',
        "musketeers": f'echo "$RAY_ADDRESS $*" >{tmp_path}/driver; trap "touch {tmp_path}/saved; exit 130" TERM; '
        "while true; do sleep 0.1; done",
    }
    tools = tmp_path / "venv" / "bin"
    tools.mkdir(parents=True)
    for name, body in fakes.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    (tools / "activate").write_text(f"export PATH={tools}:{Path(sys.executable).parent}:$PATH\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {
        "SHARED": str(tmp_path), "VENV": str(tmp_path / "venv"), "HEAD_IP": "127.0.0.1", "PORT": str(port),
        "JOIN_DEADLINE": "120", "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "[a-b]",
        "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        ["bash", SLURM, "recipe.yaml", "run=mine"], env=inherited | own, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    yield process, tmp_path
    for left in psutil.process_iter(["environ"]):
        if (left.info["environ"] or {}).get("SHARED") == str(tmp_path):
            left.kill()


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_goes_back_to_the_queue(
    slurm: tuple[subprocess.Popen[str], Path],
) -> None:
    process, folder = slurm
    deadline = time.monotonic() + 120
    while not (folder / "driver").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)[0]
        time.sleep(0.2)
    token = folder / ".musketeers" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
    assert len(token.read_text()) == 64 and os.listdir(token.parent) == ["auth_token"]
    address, *words = (folder / "driver").read_text().split()
    assert address.startswith("127.0.0.1:")
    assert words == ["train", "recipe.yaml", f"root={folder}/runs", "--auto-resume", "run=mine"]
    process.send_signal(signal.SIGUSR1)  # to the script alone, as Slurm does
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "2 machines have joined" in said, said
    assert (folder / "saved").exists() and (folder / "requeued").read_text() == "requeue 42\n"
