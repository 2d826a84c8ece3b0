"""Model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.zoo.recipe import END, FILLER, ExpertRecipe, PolicyRecipe, Recipe

_WHAT = {
    "greedy": "own answer",
    "no_hint": "without hint",
    "right_hint": "with the right hint",
    "experts_hint": "with the experts' own answers as hint",
}


def write_card(folder: Path, recipe: Recipe, model: ExpertRecipe | PolicyRecipe, result: dict[str, Any]) -> None:
    """Writes README.md: what the model is, how well it does on held-out prompts, how it was made."""
    size = f"{result['parameters']:,} parameters, vocabulary of {result['vocabulary']}"
    lines = [
        f"# zoo/{recipe.world}/{model.name}",
        "",
        f"A {model.model.architecture} of {size}, trained in {result['cpu_seconds']:.0f} s of one CPU core for the",
        f"`{recipe.world}` world of n-Musketeers. It answers nothing but this world's prompts.",
        "",
        *_role(recipe, model),
        "",
        f"## Greedy accuracy on held-out prompts (at most {recipe.evaluate} a task)",
        "",
        *_table(result["accuracy"]),
        "",
        *_caveat(recipe),
        "",
        "## Recipe",
        "",
        "```yaml",
        yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False).rstrip(),
        "```",
        "",
        f"World seed {recipe.seed}, data seed {recipe.data.seed}, fingerprint {recipe.fingerprint}.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _role(recipe: Recipe, model: ExpertRecipe | PolicyRecipe) -> list[str]:
    if isinstance(model, ExpertRecipe):
        return [f"It reads a prompt and answers its `{model.task}` part, then `{END}`."]
    hint = model.hint
    example = "7+4" if hint.layout == "operands" else "7"
    slots = example + FILLER * (hint.slots - len(example))
    weak = f"Of its documents without a hint {hint.corrupted:.0%} had a wrong answer as their target, to keep it weak."
    return [
        f"It reads {hint.slots} embedding slots in front of its prompt (or none at all), where a soft prefix goes. In",
        f"training they held textual hints such as `{slots}`, so it can use what stands there.",
        *([weak] if hint.corrupted else []),
    ]


def _caveat(recipe: Recipe) -> list[str]:
    if recipe.data.split_by == "question":
        return ["No question in these was trained on, neither alone nor as a part of a composed prompt."]
    if not recipe.composed:
        return ["No prompt of these was trained on."]
    return [
        "No prompt of these was trained on, but prompts are held out whole: most questions of a single task's held-out",
        "prompts stand in composed training prompts, and so do most parts of held-out composed prompts.",
    ]


def _table(accuracy: dict[str, dict[str, float]]) -> list[str]:
    tasks = sorted({task for row in accuracy.values() for task in row})
    rows = [
        f"| {_WHAT[kind]} | " + " | ".join(_cell(row, task) for task in tasks) + " |" for kind, row in accuracy.items()
    ]
    return ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|", *rows]


def _cell(row: dict[str, float], task: str) -> str:
    return f"{row[task]:.3f}" if task in row else ""
