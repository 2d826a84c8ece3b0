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
