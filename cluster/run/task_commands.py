"""The commands about tasks: `musketeers tasks` and `score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()
tasks_app = typer.Typer()

TaskName = Annotated[str, typer.Argument(help="A Reasoning Gym data set, or a task of --config.", show_default=False)]
RecipeOption = Annotated[Path | None, typer.Option("--config", help="A recipe with the task.", show_default=False)]
SeedOption = Annotated[int, typer.Option(help="What the entries are generated from.")]
LevelOption = Annotated[int | None, typer.Option(help="Of the data set's curriculum.", min=0, show_default=False)]


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


@tasks_app.command("export")
def tasks_export(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides.", show_default=False)] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test; all by default.", show_default=False)
    ] = None,
) -> None:
    """Write a recipe's prompts as JSON lines: task, split, ordinal, text, answer, and the questions in them."""
    import json

    from cluster.run.catalogue import exported

    for line in exported(recipe, overrides or [], split):
        print(json.dumps(line))


def score(
    name: Annotated[
        str,
        typer.Argument(
            help="A Reasoning Gym data set, or a task of --config; with --steps a run's folder.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value overrides of --config, or of the run's settings.", show_default=False),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--input", help="JSON lines with index and completion.", show_default=False)
    ] = None,
    attack: Annotated[
        bool, typer.Option("--attack", help="Try hostile, wrong and right completions; exit 1 if a wrong one is right.")
    ] = False,
    steps: Annotated[
        str | None, typer.Option(help="A..B: score a run's saved groups of these steps again.", show_default=False)
    ] = None,
    config: RecipeOption = None,
    seed: SeedOption = 0,
    level: LevelOption = None,
    count: Annotated[int, typer.Option(help="With --attack: entries of the task.", min=1)] = 20,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for one completion; 10 by default, or as configured.", min=0.01, show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --attack and --steps: as JSON.")] = False,
) -> None:
    """Try a verifier before a run trusts it, on a file or on an attack, or score a run's groups again."""
    from cluster.config import ConfigError

    if [source is not None, attack, steps is not None].count(True) != 1:
        raise ConfigError("musketeers score takes one of --input FILE, --attack and --steps A..B")
    if source is not None:
        if overrides or as_json:
            raise ConfigError(f"--input takes no {'overrides' if overrides else '--json: its lines are JSON'}")
        _score_file(name, config, seed, source, level, 10.0 if timeout is None else timeout)
    elif attack:
        _attack(name, config, overrides or [], seed, count, level, timeout, as_json)
    else:
        assert steps is not None
        _score_run(Path(name), steps, config, overrides or [], timeout, as_json)


def _score_file(name: str, config: Path | None, seed: int, source: Path, level: int | None, timeout: float) -> None:
    import json

    from cluster.run.catalogue import score_file
    from rewards.config import RewardsConfig

    rewards = RewardsConfig(timeout_s=timeout, binary_at=None)
    for line in score_file(name, config, seed, source, rewards, level):
        print(json.dumps(line), flush=True)


def _attack(
    name: str,
    config: Path | None,
    overrides: list[str],
    seed: int,
    count: int,
    level: int | None,
    timeout: float | None,
    as_json: bool,
) -> None:
    import json

    from cluster.run import catalogue

    tally = catalogue.attack_task(name, config, overrides, seed, count, level, timeout)
    if as_json:
        print(json.dumps({"task": name, **tally.as_data()}, indent=1))
    else:
        catalogue.show_attack(console, name, tally)
    raise typer.Exit(0 if tally.passed else 1)


def _score_run(
    run: Path, steps: str, config: Path | None, overrides: list[str], timeout: float | None, as_json: bool
) -> None:
    import json

    from cluster.run.rescore import rescore_run, show_changes

    found = rescore_run(run, steps, config, overrides, timeout)
    if as_json:
        tasks = {name: changes.as_data() for name, changes in found.items()}
        print(json.dumps({"run": str(run), "steps": steps, "tasks": tasks}, indent=1))
    else:
        show_changes(console, run, steps, found)
