"""Jobs on a real cluster of four nodes: submitted, followed, watched, stopped, gone on with; and a node that dies."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from playwright.sync_api import Page, sync_playwright
from rich.console import Console

from cluster.run.folder import RunFolder
from cluster.watch import dashboards
from cluster.watch.status import RunStatus
from tests.jobs.nodes import BIN, Cluster, free_ports, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
CURRICULUM = str(ROOT / "configs" / "curriculum.yaml")
PACKAGES = "run scripts/system-packages.sh --slow-tests"
# Every worker that holds a model has a GPU, so that the four are on three nodes with two each.
GPUS = ("experts.0.gpus=1", "experts.1.gpus=1", "policy.gpus=1", "learner.gpus=1")
SMALL = (
    "evaluation.prompts=20", "evaluation.router_examples=30", "evaluation.cache=null", "checkpoint.every=5",
    "sampling.samples=8", "learner.groups=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without GPUs and three workers with two each."""
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.head("--num-cpus=2", "--num-gpus=0")
        made.alive(1)
        made.grown(3, "--num-cpus=1", "--num-gpus=2")
        yield made
    finally:
        made.close()


def submit(cluster: Cluster, run: str, *overrides: str, recipe: str = QUICKSTART, follow: bool = False) -> str:
    """Submits a recipe under a name; what the command printed."""
    options = ["--follow"] if follow else []
    said = cluster.musketeers(
        "submit", recipe, f"run={run}", f"root={cluster.folder}/runs", *GPUS, *SMALL, *overrides,
        "--address", cluster.address, *options,
    )  # fmt: skip
    return said.stdout


def moment(cluster: Cluster, run: str) -> dict[str, Any]:
    """The newest of a run's status file."""
    try:
        found: dict[str, Any] = json.loads((cluster.folder / "runs" / run / "status.json").read_text())
    except FileNotFoundError:
        found = {"step": -1, "phase": "starting", "workers": []}
    return found


def trained(cluster: Cluster, run: str) -> list[dict[str, Any]]:
    """A run's steps."""
    return [json.loads(line) for line in (cluster.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def state_of(cluster: Cluster, run: str) -> str:
    """The newest job's state, and its message."""
    said = cluster.musketeers("jobs", "--run", run, "--address", cluster.address).stdout
    return next((line for line in said.splitlines() if run in line), "")


def every_ordinal_once(cluster: Cluster, run: str, steps: int) -> None:
    """Each step trained a batch, and no prompt was trained twice or lost on the way."""
    lines = trained(cluster, run)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    ordinals = [ordinal for line in lines for ordinal in line["ordinals"]]
    assert len(ordinals) == len(set(ordinals)) == steps * 8
    last = cluster.folder / "runs" / run / "checkpoints" / f"step-{steps:06d}"
    kept = json.loads((last / "driver.json").read_text())["admission"]
    assert not kept["dead"]


def test_a_client_without_the_token_can_do_nothing(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    for token in ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, {"RAY_AUTH_MODE": "disabled"}):
        nobody = {**token, "HOME": str(tmp_path)}
        for command in (["jobs"], ["logs", "any"], ["stop", "any"], ["submit", QUICKSTART]):
            said = cluster.musketeers(*command, "--address", cluster.address, check=False, **nobody)
            assert said.returncode == 2 and "wants its token" in said.stderr, (command, said.stdout, said.stderr)
        actors = subprocess.run(
            [str(BIN / "ray"), "list", "actors", f"--address={cluster.address}"],
            capture_output=True, text=True, env={**cluster.environment, **nobody}, timeout=120,
        )  # fmt: skip
        assert actors.returncode != 0 and "Authentication" in actors.stderr + actors.stdout
    for path in ("/api/jobs/", "/api/v0/actors", "/api/jobs/any/logs", "/nodes?view=summary"):
        assert requests.get(cluster.address + path, timeout=30).status_code == 401, path


def test_the_doctor_sees_every_node(cluster: Cluster) -> None:
    recipe = [QUICKSTART, f"root={cluster.folder}/runs"]
    (cluster.folder / "runs").mkdir(exist_ok=True)
    well = cluster.musketeers("doctor", *recipe, *GPUS, "--address", cluster.gcs)
    assert "4 nodes" in well.stdout and "127.0.0.5" in well.stdout and "asks for 0 CPUs and 4 GPUs" in well.stdout
    seven = ["experts.0.gpus=1", "experts.0.replicas=7"]
    more = cluster.musketeers("doctor", *recipe, *seven, "--address", cluster.gcs, check=False)
    assert more.returncode == 1 and "7 GPUs and 0 CPUs asked for; there are 6 and 5" in " ".join(more.stdout.split())
    wrong = cluster.musketeers("doctor", "--address", cluster.gcs, check=False, RAY_AUTH_TOKEN_PATH="/dev/null")
    assert wrong.returncode == 1 and "Traceback" not in wrong.stdout + wrong.stderr


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--env", "NOBODY_SET_THIS"], "--env NOBODY_SET_THIS: this variable is not set here"),
        (["--env", "TOKENIZERS_PARALLELISM"], "--env TOKENIZERS_PARALLELISM: the run sets this variable itself"),
        (["--module", "/no/such/package"], "--module /no/such/package: there is no such folder or wheel"),
        (["execution=inline"], "a job needs execution: ray"),
    ],
)
def test_what_cannot_be_submitted_is_refused(cluster: Cluster, option: list[str], reason: str) -> None:
    environment = {"TOKENIZERS_PARALLELISM": "true"}
    said = cluster.musketeers("submit", QUICKSTART, *option, "--address", cluster.address, check=False, **environment)
    assert said.returncode == 2 and reason in " ".join(said.stderr.split()), said.stderr


def test_a_job_is_submitted_followed_and_gone_on_with(cluster: Cluster) -> None:
    first = submit(cluster, "again", "steps=10", follow=True)
    assert "run again starts in" in first and "step 10/10" in first and "SUCCEEDED" in first
    assert "py_modules_files" in first, "the job did not run from the wheel that it carried"
    second = submit(cluster, "again", "steps=15", follow=True)
    assert "run again goes on in" in second and "SUCCEEDED" in second
    every_ordinal_once(cluster, "again", 15)
    said = cluster.musketeers("logs", "again", "--address", cluster.address).stdout
    assert "run again goes on in" in said, "the newest job's log is meant"


def test_a_run_is_watched_and_stopped(cluster: Cluster, tmp_path: Path) -> None:
    submit(cluster, "watched", "steps=100000", "max_staleness=2", recipe=CURRICULUM)
    wait_for("some steps", lambda: moment(cluster, "watched")["step"] >= 3, 600)
    workers = {worker["name"] for worker in moment(cluster, "watched")["workers"]}
    with prometheus(cluster, tmp_path) as address:
        everything_has_data(address)
    with browser(cluster) as page:
        look_at(page, cluster, "jobs", ["watched", "RUNNING", "training: step"])
        look_at(page, cluster, "actors", [*workers, "ALIVE"])
    assert "training: step" in state_of(cluster, "watched")
    if pictures := os.environ.get("MUSKETEERS_PICTURES"):
        draw_status(cluster.folder / "runs" / "watched", Path(pictures) / "status.svg")
    said = cluster.musketeers("stop", "watched", "--address", cluster.address)
    assert "with a checkpoint" in said.stdout
    wait_for("the end", lambda: "stopped" in state_of(cluster, "watched"), 120, 2.0)
    steps = [line["step"] for line in trained(cluster, "watched")]
    assert (cluster.folder / "runs" / "watched" / "checkpoints" / f"step-{steps[-1]:06d}" / "manifest.json").is_file()
    assert moment(cluster, "watched")["phase"] == "stopped"
    shown = cluster.musketeers("status", f"{cluster.folder}/runs/watched", "--once").stdout
    assert all(worker in shown for worker in workers) and "stopped" in shown


def test_a_node_dies_and_the_run_finishes(cluster: Cluster) -> None:
    submit(cluster, "bereaved", "steps=40", "max_staleness=2")
    wait_for("some steps", lambda: moment(cluster, "bereaved")["step"] >= 5, 600)
    where = wait_for(
        "where the experts are",
        lambda: {w["node"] for w in moment(cluster, "bereaved")["workers"] if w["name"].startswith("Expert")} - {""},
    )
    victim = sorted(where)[0]
    node = cluster.nodes[int(victim.rpartition(".")[2]) - 2]
    node.kill()
    wait_for("the end", lambda: moment(cluster, "bereaved")["phase"] == "finished", 900, 2.0)
    wait_for("the job's end", lambda: "succeeded" in state_of(cluster, "bereaved"), 120, 2.0)
    every_ordinal_once(cluster, "bereaved", 40)
    summary = json.loads((cluster.folder / "runs" / "bereaved" / "summary.json").read_text())
    assert sum(summary["restarts"].values()) >= 1, "nothing died: the wrong node was killed"
    after = {worker["node"] for worker in moment(cluster, "bereaved")["workers"]}
    assert victim not in after, "a worker claims to be on the dead node"


@contextlib.contextmanager
def prometheus(cluster: Cluster, folder: Path) -> Iterator[str]:
    """Debian's Prometheus on the files that the project writes for it; its address."""
    program = shutil.which("prometheus")
    assert program, f"prometheus is not installed: {PACKAGES}"
    cluster.musketeers("metrics", "--out", str(folder / "monitoring"), "--ray", str(cluster.sessions))
    (port,) = free_ports(1)
    command = [
        program, f"--config.file={folder}/monitoring/prometheus/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def everything_has_data(address: str) -> None:
    """Every panel's and alert's query, and the rules themselves are healthy."""

    def empty() -> list[str]:
        queries = [q.expression for _, row in dashboards.ROWS for panel in row for q in panel.queries]
        queries += [alert.expression for alert in dashboards.ALERTS]
        return [query for query in queries if not ask(dashboards.everywhere(query))]

    def ask(query: str) -> list[Any]:
        try:
            answer = requests.get(f"{address}/api/v1/query", params={"query": query}, timeout=30)
        except requests.ConnectionError:
            return []
        if answer.status_code == requests.codes.service_unavailable:
            return []  # it listens before it is ready
        said = answer.json()
        assert said["status"] == "success", said
        return [sample for sample in said["data"]["result"] if sample["value"][1] != "NaN"]

    deadline = time.monotonic() + 180
    while missing := empty():
        assert time.monotonic() < deadline, f"without data: {missing}"
        time.sleep(5)
    groups = requests.get(f"{address}/api/v1/rules", timeout=30).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(dashboards.ALERTS)
    assert all(rule["health"] == "ok" for rule in rules), rules


def draw_status(run: Path, target: Path) -> None:
    """What `musketeers status` shows now."""
    config = RunFolder(run).saved_config()
    status = RunStatus(run, [expert.name for expert in config.experts], config.steps)
    status.look()
    console = Console(record=True, width=130, height=40, file=io.StringIO(), force_terminal=True)
    console.print(status)
    drawn = console.export_svg(title=f"musketeers status {run.name}")
    # Without the fonts that rich would have a reader's browser fetch.
    target.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8")


@contextlib.contextmanager
def browser(cluster: Cluster) -> Iterator[Page]:
    """Debian's Chromium, which shows the cluster's token."""
    program = shutil.which("chromium")
    assert program, f"chromium is not installed: {PACKAGES}"
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        context = chromium.new_context(
            extra_http_headers={"Authorization": f"Bearer {cluster.token.read_text()}"},
            viewport={"width": 1500, "height": 900},
        )
        yield context.new_page()
        chromium.close()


def look_at(page: Page, cluster: Cluster, name: str, expected: list[str]) -> None:
    """Opens a page of Ray's dashboard until it shows all of this; the picture goes to $MUSKETEERS_PICTURES if set."""

    def missing() -> list[str]:
        text = page.inner_text("body")
        return [each for each in expected if each not in text]

    page.goto(f"{cluster.address}/#/{name}")
    deadline = time.monotonic() + 90
    while absent := missing():
        assert time.monotonic() < deadline, f"the page {name} does not show {absent}:\n{page.inner_text('body')[:3000]}"
        page.wait_for_timeout(1000)
    if pictures := os.environ.get("MUSKETEERS_PICTURES"):
        page.screenshot(path=Path(pictures) / f"dashboard-{name}.png")
