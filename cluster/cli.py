"""The `musketeers` command."""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.run.environment import PROCESS_ENVIRONMENT

STORAGE_ERRORS = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO}

console = Console()
errors = Console(stderr=True)

app = typer.Typer(
    help="Router-only reinforcement learning over frozen language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
zoo_app = typer.Typer(help="The tiny local zoo of experts and policies.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")
tasks_app = typer.Typer()
app.add_typer(tasks_app, name="tasks")

ConfigPath = Annotated[Path, typer.Argument(help="A YAML recipe, e.g. configs/quickstart.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="key=value overrides, e.g. seed=1 learner.learning_rate=2e-4.", show_default=False),
]
TaskName = Annotated[str, typer.Argument(help="A Reasoning Gym data set, or a task of --config.", show_default=False)]
RecipeOption = Annotated[Path | None, typer.Option("--config", help="A recipe with the task.", show_default=False)]
SeedOption = Annotated[int, typer.Option(help="What the entries are generated from.")]
LevelOption = Annotated[int | None, typer.Option(help="Of the data set's curriculum.", min=0, show_default=False)]
RunPath = Annotated[Path, typer.Argument(help="A run's folder, e.g. runs/quickstart.", show_default=False)]


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(f"musketeers {version('n-musketeers')}", highlight=False)
        raise typer.Exit()


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run's folder if it exists.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and the plan of workers, and stop.")
    ] = False,
) -> None:
    """Train a router.  Ctrl-C stops with a checkpoint; --resume goes on."""
    from cluster.config import ConfigError, load
    from cluster.run.preflight import check_names
    from rewards.sources import build_tasks

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other: choose one")
    settings = load(config, overrides or [])
    check_names(settings)
    if dry_run:
        build_tasks(settings.data)
        _print_plan(settings)
        return
    from cluster.run.training import train as run_training

    raise typer.Exit(run_training(settings, resume, overwrite, console))


@app.command(name="eval")
def evaluate(
    run: RunPath,
    step: Annotated[int | None, typer.Option(help="Which checkpoint; the last one by default.")] = None,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    prompts: Annotated[int | None, typer.Option(help="Prompts a task; the run's own number by default.", min=1)] = None,
) -> None:
    """Measure a run's router and its baselines again, on held-out prompts."""
    from cluster.run.afterwards import evaluate_run

    evaluate_run(run, step, split, prompts, console)


@app.command()
def replay(run: RunPath, step: Annotated[int, typer.Option(help="The step to recompute.", min=1)]) -> None:
    """Recompute a step's loss and gradient from its saved groups; exit status 1 when the logged norm is not met."""
    from cluster.run.afterwards import replay_step

    raise typer.Exit(0 if replay_step(run, step, console) else 1)


@zoo_app.command("build")
def zoo_build(
    world: Annotated[str, typer.Argument(help="A world's name: composed or separable.")] = "composed",
    force: Annotated[bool, typer.Option("--force", help="Build again even if it is there.")] = False,
) -> None:
    """Train a world's experts and policy; training runs do this by themselves when needed."""
    from cluster.zoo.build import build

    console.print(f"zoo/{world} is at {build(world, force=force)}", highlight=False)


@tasks_app.callback(invoke_without_command=True)
def tasks(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Show a recipe's own tasks instead.", show_default=False)] = None,
    category: Annotated[str | None, typer.Option(help="Only this category.", show_default=False)] = None,
    examples: Annotated[int, typer.Option(help="With --config: examples a task.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """List all Reasoning Gym tasks with an example each, or show one, or a recipe's."""
    if context.invoked_subcommand is not None:
        return
    from cluster.run import catalogue

    if config is not None:
        catalogue.show_recipe(console, config, examples)
    else:
        catalogue.list_tasks(console, category, as_json)


@tasks_app.command("show")
def tasks_show(
    name: TaskName,
    config: RecipeOption = None,
    seed: SeedOption = 0,
    count: Annotated[int, typer.Option(help="How many prompts.", min=1)] = 3,
    level: LevelOption = None,
) -> None:
    """Render some prompts of a task, with their answers."""
    from cluster.run.catalogue import show_task

    show_task(console, name, config, seed, count, level)


@app.command()
def score(
    name: TaskName,
    source: Annotated[Path, typer.Option("--input", help="JSON lines with index and completion.", show_default=False)],
    config: RecipeOption = None,
    seed: SeedOption = 0,
    level: LevelOption = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one completion.", min=0.01)] = 10.0,
) -> None:
    """Score a file of completions through a reward worker: try a verifier before a run trusts it."""
    import json

    from cluster.run.catalogue import score_file
    from rewards.config import RewardsConfig

    rewards = RewardsConfig(timeout_s=timeout, binary_at=None)
    for line in score_file(name, config, seed, source, rewards, level):
        print(json.dumps(line), flush=True)


@app.command()
def doctor(
    address: Annotated[str | None, typer.Option(help="A Ray cluster's address to look at.")] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders are to go.")] = Path("runs"),
) -> None:
    """Check this machine: versions, compiler, memory, disk, Ray.  Exit status 0 or 1."""
    from cluster.jobs.doctor import checks, report
    from cluster.zoo.paths import zoo_root

    raise typer.Exit(report(checks(runs=runs, zoo=zoo_root(), address=address), console))


def _print_plan(settings: object) -> None:
    from cluster.config import RunConfig
    from cluster.run.preflight import plan_rows

    assert isinstance(settings, RunConfig)
    console.print(settings.as_yaml(), highlight=False, markup=False)
    table = Table("stage", "workers", "model", "threads", "CPUs", "GPUs", title="plan of workers")
    for row in plan_rows(settings):
        table.add_row(row.stage, str(row.workers), row.model, row.threads, f"{row.cpus:g}", f"{row.gpus:g}")
    console.print(table)


def main() -> None:
    """Entry point: what a user did wrong is one line and exit status 2, never a traceback."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except ValueError as error:
        if not _is_own(error):
            raise
        errors.print(f"[bold red]error:[/] {' '.join(str(error).split())}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except RuntimeError as error:
        if not _is_own(error):
            raise
        errors.print(f"[bold red]the run stopped:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        place = error.filename or "the run's folder"
        errors.print(
            f"[bold red]the run stopped:[/] {place} cannot be written: {error.strerror}; put that right and go on "
            "with --resume, the last checkpoint is whole",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted before training began; nothing was lost", highlight=False)
        sys.exit(130)


def _is_own(error: Exception) -> bool:
    """Errors of our own that name a remedy; anything else is a bug and keeps its traceback."""
    return type(error).__module__.split(".")[0] in ("experts", "rollout", "rewards", "learner", "cluster")


if __name__ == "__main__":
    main()
