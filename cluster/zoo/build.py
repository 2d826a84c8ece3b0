"""Builds a zoo world: every model in a process of its own, all of it or nothing."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cluster.zoo.cards import write_card
from cluster.zoo.paths import MANIFEST, check, is_built, sha256, world_folder, zoo_root
from cluster.zoo.progress import Progress
from cluster.zoo.recipe import ZOO_FORMAT, ExpertRecipe, PolicyRecipe, Recipe, ZooError, load_recipe
from cluster.zoo.worker import TOGETHER

LOCK_WAIT_S = 1800.0


def build(
    world: str | Path, root: Path | None = None, force: bool = False, progress: bool = True, processes: int = 2
) -> Path:
    """Builds a world unless it is there and whole, and returns its folder.

    world: a world's name or a recipe's YAML file.
    root: the zoo's folder, by default `zoo_root()`.
    force: build again even if it is there; the old one is kept until the new one is whole.
    processes: how many models train at once, one torch thread each.

    Raises:
        ZooError: when the recipe is wrong, a model's training fails, or the world is there but damaged.
    """
    recipe = load_recipe(world)
    folder = world_folder(recipe, root or zoo_root())
    if is_built(folder) and not force:
        check(folder, recipe.world)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=LOCK_WAIT_S)
    try:
        with lock:
            if is_built(folder) and not force:  # another process built it while we waited
                return folder
            for left in folder.parent.glob(f".{folder.name}-building-*"):  # of a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-building-", dir=folder.parent))
            try:
                _build_into(made, recipe, Progress(progress), processes)
                _replace(folder, made)
            finally:
                shutil.rmtree(made, ignore_errors=True)
    except Timeout as error:
        raise ZooError(
            f"another process has been building {folder} for {LOCK_WAIT_S:.0f} s: end it, then try again"
        ) from error
    return folder


def _replace(folder: Path, made: Path) -> None:
    """Puts the new folder where the old one was; a crash in between leaves none, never a mixture."""
    old = made.with_name(made.name + "-old")
    with suppress(FileNotFoundError):
        folder.rename(old)
    made.chmod(0o755)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class _Job:
    """A worker: one model's training, or the measurement of all together."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    unread: bytes = b""
    result: dict[str, Any] = field(default_factory=dict)


def _build_into(folder: Path, recipe: Recipe, progress: Progress, processes: int) -> None:
    start = time.perf_counter()
    recipe_file = folder / "recipe.json"
    recipe_file.write_text(recipe.model_dump_json(indent=1), encoding="utf-8")
    with progress:
        names = [model.name for model in sorted(recipe.models, key=_work, reverse=True)]
        for model in recipe.models:
            progress.add(model.name, steps_of(model))
        results = _run(names, folder, recipe_file, progress, processes)
        progress.note("measuring the models together")
        together = _run([TOGETHER], folder, recipe_file, progress, 1)[TOGETHER]["accuracy"]
    results[recipe.policy.name]["accuracy"]["experts_hint"] = together
    for model in recipe.models:
        write_card(folder / model.name, recipe, model, results[model.name])
    for log in folder.glob("*.log"):
        log.unlink()
    files = {
        str(path.relative_to(folder)): {
            "bytes": path.stat().st_size,
            "sha256": sha256(path, path.stat().st_size, path.stat().st_mtime_ns),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format": ZOO_FORMAT,
        "world": recipe.world,
        "fingerprint": recipe.fingerprint,
        "seconds": round(time.perf_counter() - start, 1),
        "models": results,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _run(
    names: list[str], folder: Path, recipe_file: Path, progress: Progress, processes: int
) -> dict[str, dict[str, Any]]:
    """Runs workers in this order; ends every one of them when one fails or the build is interrupted."""
    waiting = list(reversed(names))
    running: dict[int, _Job] = {}
    results: dict[str, dict[str, Any]] = {}
    try:
        with selectors.DefaultSelector() as selector:
            while waiting or running:
                while waiting and len(running) < processes:
                    job = _start(waiting.pop(), folder, recipe_file)
                    running[job.process.pid] = job
                    selector.register(job.process.stdout, selectors.EVENT_READ, job)  # type: ignore[arg-type]
                for key, _ in selector.select(timeout=1.0):
                    job = key.data
                    if not _read(job, progress):
                        selector.unregister(key.fileobj)
                        del running[job.process.pid]
                        results[job.name] = _finish(job)
                        progress.done(job.name)
    finally:
        for job in running.values():
            job.process.kill()
            job.process.wait()
            job.process.stdout.close()  # type: ignore[union-attr]
    return results


def steps_of(model: ExpertRecipe | PolicyRecipe) -> int:
    """Training steps of all phases."""
    warm = model.warm.steps if isinstance(model, PolicyRecipe) and model.warm else 0
    return warm + model.training.steps


def _work(model: ExpertRecipe | PolicyRecipe) -> float:
    shape = model.model
    return steps_of(model) * model.training.batch * shape.layers * shape.width * (shape.width + shape.feedforward)


def _start(name: str, folder: Path, recipe_file: Path) -> _Job:
    log = folder / f"{name}.log"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "cluster.zoo.worker", str(recipe_file), name, str(folder)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches us alone; we end the workers
        )
    return _Job(name, process, log)


def _read(job: _Job, progress: Progress) -> bool:
    """Takes what a worker has written; False when it has closed its output."""
    assert job.process.stdout is not None
    data = os.read(job.process.stdout.fileno(), 65536)
    *lines, job.unread = (job.unread + data).split(b"\n")
    for line in lines:
        with suppress(json.JSONDecodeError):
            message = json.loads(line)
            if "result" in message:
                job.result = message["result"]
            elif "step" in message:
                progress.step(job.name, message["step"], message["loss"])
    return bool(data)


def _finish(job: _Job) -> dict[str, Any]:
    code = job.process.wait()
    job.process.stdout.close()  # type: ignore[union-attr]
    if code or not job.result:
        lines = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        raise ZooError(f"zoo worker {job.name!r} failed (exit code {code}): {lines[-1]}")
    return job.result
