"""A real server, Ray Serve and all, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from rich.console import Console

from cluster.run import afterwards, checkpoint
from cluster.run.baselines import KnownBaselines, fingerprints
from cluster.run.evaluate import Evaluator
from cluster.run.trained import open_trained
from cluster.serve.local import Musketeers
from experts.standins import write_stand_ins
from rollout.types import Rollout
from tests.e2e.conftest import ROOT, Runs
from tests.e2e.conftest import models as models
from tests.processes import descendants

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
KEY = "a secret"
PROMPTS = 200
DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """A run of two steps."""
    runs = Runs(tmp_path_factory.mktemp("served"), models)
    tasks = "data.tasks=[{name: sums, dataset: chain_sum, size: 2000, config: {max_terms: 3, max_digits: 2}}]"
    prefix = "router.prefix.scale=0.05"
    done = runs.train(tasks, "steps=2", f"evaluation.prompts={PROMPTS}", "run=tiny", prefix, "rewards.binary_at=1.0")
    assert done.returncode == 0, done.stderr
    folder = runs.folder / "runs" / "tiny"
    write_stand_ins(folder, open_trained(folder).snapshot.checksum, {"one": np.ones((1, 24), np.float32)})
    return folder


class Server:
    """`musketeers serve` in a process of its own."""

    def __init__(self, run: Path, folder: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "serve.log"
        (folder / "key").write_text(KEY + "\n")
        command = [sys.executable, "-m", "cluster.cli", "serve", str(run), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--api-key-file", str(folder / "key"), *arguments],
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
            cwd=folder,
        )

    def get(self, path: str, key: str | None = KEY) -> tuple[int, str]:
        """Status and body."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def health(self) -> dict[str, Any]:
        """Of the policy and the experts."""
        return json.loads(self.get("/health")[1])

    def until(self, what: str, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        """Waits for something."""
        ends = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < ends, f"{what} did not happen: {self.log.read_text()}"
            time.sleep(0.1)

    def replicas(self, name: str) -> list[psutil.Process]:
        """Processes of a deployment."""
        return descendants(psutil.Process(self.process.pid), name)


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests; it ends by Ctrl-C, well, and leaves no process."""
    started = Server(run, tmp_path_factory.mktemp("server"))
    try:
        started.until("the start", lambda: "Ctrl-C stops it" in started.log.read_text())
        yield started
        children = psutil.Process(started.process.pid).children(recursive=True)
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(timeout=60) == 0, started.log.read_text()
        _, left = psutil.wait_procs(children, timeout=60)
        assert not left
    finally:
        if started.process.poll() is None:
            started.process.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    """OpenAI's own."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def test_greedy_answers_are_those_of_the_evaluation(client, server, run) -> None:
    saved = checkpoint.read(run / "checkpoints")
    config, _, tasks, started = afterwards._open(run, saved, Console())

    worker, rollouts = started.fleet.rollouts[0].worker, list[Rollout]()  # type: ignore[attr-defined]
    generate = worker.generate

    def noted(*arguments: Any, **settings: Any) -> Rollout:
        rollouts.append(generate(*arguments, **settings))
        return rollouts[-1]

    worker.generate = noted

    async def evaluated() -> list[tuple[list[Any], str]]:
        known = KnownBaselines(config, tasks, fingerprints(started.experts, started.policy))
        evaluator = Evaluator(config, started.fleet, tasks, known)
        await evaluator.router(evaluator.prompts("test", PROMPTS), saved.learner.snapshot)
        groups = [group for rollout in rollouts for group in rollout.groups]
        assert len(groups) == PROMPTS
        return [(list(group.prompt.messages), group.completions[0].text) for group in groups]

    wanted = asyncio.run(evaluated())
    started.fleet.close()

    def ask(messages: list[Any]) -> str:
        made = client.chat.completions.create(model="tiny", messages=messages, temperature=0)  # type: ignore[arg-type]
        return made.choices[0].message.content or ""

    with concurrent.futures.ThreadPoolExecutor(16) as several:
        said = list(several.map(ask, [messages for messages, _ in wanted]))
    assert said == [text for _, text in wanted]
    assert len(set(said)) > 20


def test_completions_streams_samples_and_usage(client, run) -> None:
    with Musketeers.from_run(run) as local:
        (answer,) = local.generate("17")
    whole = client.completions.create(model="tiny", prompt="17", temperature=0)
    assert whole.choices[0].text == answer.text and whole.choices[0].finish_reason == answer.finish
    said = whole.model_extra["musketeers"]
    assert said["attention"] == pytest.approx(dict(answer.attention), abs=1e-4)
    assert said["prefix"] == answer.gate and said["masked"] == {}
    assert whole.usage.completion_tokens == answer.tokens
    stream = client.completions.create(
        model="tiny", prompt=["17", "4"], temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = ["".join(c.text for chunk in chunks for c in chunk.choices if c.index == i) for i in (0, 1)]
    assert texts == [answer.text, client.completions.create(model="tiny", prompt="4", temperature=0).choices[0].text]
    ends = [chunk for chunk in chunks if any(c.finish_reason for c in chunk.choices)]
    assert len(ends) == 2 and all("attention" in chunk.model_extra["musketeers"] for chunk in ends)
    assert chunks[-1].usage.prompt_tokens > 0 and not chunks[-1].choices
    sampled = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "17"}], n=4, seed=3, logprobs=True, temperature=1.0
    )
    again = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "17"}], n=4, seed=3, logprobs=True, temperature=1.0
    )
    assert [c.message.content for c in sampled.choices] == [c.message.content for c in again.choices]
    assert len({c.message.content for c in sampled.choices}) > 1
    assert sampled.choices[0].logprobs.content[0].logprob <= 0
    cut = client.completions.create(model="tiny", prompt="17", temperature=0, stop=answer.text[1:2])
    assert cut.choices[0].text == answer.text[: answer.text.find(answer.text[1:2])]
    assert cut.choices[0].finish_reason == "stop"


def test_models_and_what_is_refused(client, server) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.model_extra["musketeers"]["experts"] == ["one", "two"]
    assert client.models.retrieve("tiny").id == "tiny"
    turn = [{"role": "user", "content": "17"}]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="large", messages=turn)
    assert unknown.value.code == "model_not_found" and "'tiny'" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "7" * 600}])
    assert long.value.code == "context_length_exceeded" and "512 tokens" in long.value.message
    with pytest.raises(openai.BadRequestError, match="tools is not supported here"):
        client.chat.completions.create(
            model="tiny", messages=turn, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0).models.list()


def test_without_the_key_every_route_but_health_answers_401(server) -> None:
    for path in (
        "/v1/models",
        "/v1/models/tiny",
        "/v1/chat/completions",
        "/docs",
        "/redoc",
        "/",
        "/nowhere",
        "/-/routes",
    ):
        assert server.get(path, None)[0] == 401, path
    assert server.get("/health", None)[0] == 200 and server.get("/-/healthz", None)[0] == 200
    assert server.get("/v1/models")[0] == 200


def test_a_stream_that_is_left_ends_in_the_engine(client, server, run) -> None:
    with Musketeers.from_run(run) as local:
        asked = [str(number) for number in range(40)]
        endless = next(
            q for q, a in zip(asked, local.generate(asked, max_new_tokens=450), strict=True) if a.finish == "length"
        )
    before = server.health()["sampled_tokens"]
    stream = client.completions.create(model="tiny", prompt=endless, temperature=0, n=128, max_tokens=450, stream=True)
    for _ in range(300):
        next(stream)
    assert server.health()["under_way"] == 128
    stream.close()
    server.until("the end of the stream", lambda: server.health()["under_way"] == 0, 60)
    assert server.health()["sampled_tokens"] - before < 128 * 450


def test_an_expert_killed_under_load_costs_no_request(client, server) -> None:
    over, whole, masked = False, [0], [0]

    def ask(number: int) -> None:
        while not over:
            prompt = str(number + whole[0] + masked[0])
            made = client.completions.create(model="tiny", prompt=prompt, temperature=0)
            said = made.model_extra["musketeers"]
            assert said["attention"]["one"] > 0, "there, or with a stand-in"
            (masked if said["masked"] else whole)[0] += 1

    with concurrent.futures.ThreadPoolExecutor(8) as several:
        asking = [several.submit(ask, 100 * number) for number in range(8)]
        try:
            server.until("some answers", lambda: whole[0] > 20)
            (victim,) = server.replicas("expert-one")
            victim.kill()
            server.until("the mask", lambda: server.health()["experts"]["one"] != "up")
            server.until("answers without it", lambda: masked[0] > 0)
            server.until("the return", lambda: server.health()["experts"]["one"] == "up")
            before = whole[0]
            server.until("answers with it", lambda: whole[0] > before)
        finally:
            over = True
        for each in asking:
            each.result()  # raises what any request has failed with
    made = client.completions.create(model="tiny", prompt="5", temperature=0)
    assert made.model_extra["musketeers"]["masked"] == {}
    log = server.log.read_text
    server.until("the word that all is well", lambda: "UNHEALTHY" not in log() or "application is RUNNING" in log())


def test_a_port_that_is_taken_and_a_place_without_a_router_are_said_at_once(server, run, tmp_path) -> None:
    for arguments, said in [
        ([str(tmp_path), "--port", "1"], "neither a run's folder"),
        ([str(run), "--host", "0.0.0.0"], "--host 0.0.0.0 is seen by other machines"),
        ([str(run), "--port", str(server.port)], f"port {server.port}"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "cluster.cli", "serve", *arguments],
            capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        )  # fmt: skip
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
