"""Builds a zoo world: models train in parallel processes, and all of it appears or nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cluster.zoo.cards import write_card
from cluster.zoo.paths import MANIFEST, check, file_entry, is_built, world_folder, zoo_root
from cluster.zoo.progress import Progress
from cluster.zoo.recipe import ZOO_FORMAT, ExpertRecipe, PolicyRecipe, Recipe, ZooError, load_recipe
from cluster.zoo.worker import TOGETHER
from cluster.zoo.workers import Workers

LOCK_WAIT_S = 1800.0


def build(
    world: str | Path, root: Path | None = None, force: bool = False, progress: bool = True, processes: int = 2
) -> Path:
    """Builds a world unless it is there and whole, and returns its folder.

    world: a world's name, with a seed after an @ if it is to be another, or a recipe's YAML file.
    root: the zoo's folder, by default `zoo_root()`.
    force: build again even if it is there; the old one is kept until the new one is whole.
    processes: how many models train at once, one torch thread each.

    Raises:
        ZooError: when the recipe is wrong, a model's training fails, or the world is there but damaged.
    """
    recipe = load_recipe(world)
    folder = world_folder(recipe, root or zoo_root())
    if is_built(folder) and not force:
        check(folder, str(world))
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=LOCK_WAIT_S):
            if is_built(folder) and not force:  # another process built it while we waited
                return folder
            _build_beside(folder, recipe, Progress(progress), processes)
    except Timeout as error:
        raise ZooError(f"another build has locked {folder} for {LOCK_WAIT_S:.0f} s: end it, then try again") from error
    return folder


def _build_beside(folder: Path, recipe: Recipe, progress: Progress, processes: int) -> None:
    """Builds in a hidden folder and renames it; one that a killed build left behind is removed."""
    for left in folder.parent.glob(f".{folder.name}-building-*"):
        shutil.rmtree(left, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-building-", dir=folder.parent))
    old = made.with_name(made.name + "-old")
    try:
        _build_into(made, recipe, progress, processes)
        with suppress(FileNotFoundError):
            folder.rename(old)
        made.chmod(0o755)
        made.rename(folder)
    finally:
        for rest in (made, old):
            shutil.rmtree(rest, ignore_errors=True)


def _build_into(folder: Path, recipe: Recipe, progress: Progress, processes: int) -> None:
    start = time.perf_counter()
    (folder / "recipe.json").write_text(recipe.model_dump_json(indent=1), encoding="utf-8")
    models = sorted(recipe.models, key=_work, reverse=True)
    with progress, Workers(folder, processes, progress) as workers:
        for model in models:
            progress.add(model.name, steps_of(model))
        results = workers.run([model.name for model in models])
        progress.note("measuring the models together")
        together = workers.run([TOGETHER])[TOGETHER]["accuracy"]
    results[recipe.policy.name]["accuracy"]["experts_hint"] = together
    for model in recipe.models:
        write_card(folder / model.name, recipe, model, results[model.name])
    for log in folder.glob("*.log"):
        log.unlink()
    manifest = {
        "format": ZOO_FORMAT,
        "world": recipe.world,
        "fingerprint": recipe.fingerprint,
        "seconds": round(time.perf_counter() - start, 1),
        "models": results,
        "files": {str(p.relative_to(folder)): file_entry(p) for p in sorted(folder.rglob("*")) if p.is_file()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def steps_of(model: ExpertRecipe | PolicyRecipe) -> int:
    """Training steps of all phases."""
    warm = model.warm.steps if isinstance(model, PolicyRecipe) and model.warm else 0
    return warm + model.training.steps


def _work(model: ExpertRecipe | PolicyRecipe) -> float:
    """Grows with the time that training takes: the longest begins first."""
    shape = model.model
    return steps_of(model) * model.training.batch * shape.layers * shape.width * (shape.width + shape.feedforward)
