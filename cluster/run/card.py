"""The model card of a bundle: what Hugging Face shows of it, and what people need to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RunConfig
from cluster.run.trained import Trained
from cluster.watch.results import label
from cluster.zoo import paths as zoo
from experts import sources
from experts.router import router_class

TAGS = ["n-musketeers", "router", "soft-prompt", "mixture-of-experts", "reinforcement-learning", "grpo"]


def card(trained: Trained, results: Mapping[str, Any]) -> str:
    """The whole `README.md`, front matter included."""
    return "\n\n".join(
        [
            _front_matter(trained.config),
            f"# {trained.name}",
            _lead(trained),
            f"## Belongs to\n\n{_models(trained)}",
            f"## Measured\n\n{_measured(results)}",
            f"## Trained\n\n{_recipe(trained, results)}",
            f"## Use\n\n{_use(trained.name)}",
            f"## Limits\n\n{_limits(results)}",
        ]
    )


def _front_matter(config: RunConfig) -> str:
    values: dict[str, Any] = {"library_name": "n-musketeers", "pipeline_tag": "text-generation", "tags": TAGS}
    if hub := sorted({model for model in config.models().values() if _is_hub_name(model)}):
        values["base_model"] = hub
    return (
        f"---\n{yaml.safe_dump(values, sort_keys=False)}# license: yours to choose, see the licenses of the models\n---"
    )


def _is_hub_name(model: str) -> bool:
    named = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model)
    ours = zoo.is_zoo(model) or sources.belongs_to_cache(model)
    return bool(named) and not ours and not Path(model).expanduser().exists()


def _lead(trained: Trained) -> str:
    size = sum(array.size for array in trained.snapshot.arrays.values())
    config = trained.config
    names = ", ".join(expert.name for expert in config.experts)
    what = {
        "states": f"reads the hidden states of frozen experts ({names})",
        "answers": f"reads the answers of frozen experts ({names})",
        "nothing": "asks no expert",
    }[getattr(router_class(config.router.kind), "asks", "states")]
    slots = f" and writes {config.router.latents} soft tokens into the prompt of a frozen policy model"
    lora = f", beside a LoRA adapter of rank {config.policy.lora.rank} on the policy" if config.policy.lora else ""
    written = slots if config.router.kind not in ("none", "text") else " and conditions a frozen policy model"
    return (
        f"A trained collaborator of kind `{config.router.kind}` with {size:,} parameters{lora}: it {what}{written}. No "
        "weight of an expert or of the policy is in this bundle, and none was changed. Made with n-Musketeers."
    )


def _models(trained: Trained) -> str:
    config, meta = trained.config, trained.meta
    head = ("role", "model", "width", "layer", "fingerprint")
    rows = [
        (
            f"expert `{expert.name}`",
            f"`{expert.model}`",
            str(was["width"]),
            str(was["layer"]),
            f"`{was['fingerprint']}`",
        )
        for expert, was in zip(config.experts, meta["experts"], strict=True)
    ]
    policy = meta["policy"]
    rows.append(("policy", f"`{config.policy.model}`", str(policy["width"]), "", f"`{policy['fingerprint']}`"))
    return _table(head, rows)


def _measured(results: Mapping[str, Any]) -> str:
    systems = results["systems"]
    if systems is None:
        return f"Step {results['step']} was not measured on held-out prompts (`musketeers eval RUN --step N` does)."
    columns = list(systems["router"])
    shown = [(label(name), cells) for name, cells in systems.items()]
    if results["untrained"]:
        shown.insert(1, ("router before training", results["untrained"]))
    rows = [(name, *(_cell(cells.get(column)) for column in columns)) for name, cells in shown]
    prompts = ", ".join(f"{count} of {task}" for task, count in results["prompts"].items())
    said = f"Accuracy on held-out prompts ({prompts}), greedy, in % with 95 % intervals; seed {results['seed']}."
    return f"{said}\n\n{_table(('', *columns), rows)}"


def _cell(cell: Mapping[str, float] | None) -> str:
    if cell is None:
        return "–"
    spread = f" ({100 * max(cell['low'], 0):.0f}–{100 * cell['high']:.0f})" if "low" in cell else ""
    return f"{100 * cell['accuracy']:.1f}{spread}"


def _recipe(trained: Trained, results: Mapping[str, Any]) -> str:
    config, start, new = trained.config, "", ", ".join(results["new_experts"])
    if config.router.warm_start.steps:
        start = f", after a warm start of {config.router.warm_start.steps} steps from the experts' words"
    if results["from_saved_router"]:
        start = f", from a trained router, of which only what belongs to {new} changed" if new else ", from a saved one"
    tasks = ", ".join(task.name for task in config.data.tasks)
    return (
        f"{trained.step} updates by {config.algorithm.kind.upper()} on {tasks}: {config.learner.groups} prompts an "
        f"update, {config.sampling.samples} samples a prompt, learning rate {config.learner.learning_rate:g}, seed "
        f"{config.seed}{start}. `recipe.yaml` has every setting, `results.json` the figures and the packages' versions."
    )


def _use(name: str) -> str:
    return f"""`DIR` is this folder; of a bundle on the hub, write `hub:USER/{name}` for it.

```bash
musketeers generate DIR "..."
musketeers serve DIR
musketeers train DIR/recipe.yaml run=more router.init=DIR
```

```python
from cluster import Musketeers

print(Musketeers.from_run("DIR").generate(["..."]))
```"""


def _limits(results: Mapping[str, Any]) -> str:
    tasks = ", ".join(results["prompts"]) if results["prompts"] else "its training's tasks"
    return (
        "It belongs to exactly these experts, at these layers, and to this policy: with any other weights, tokenizer "
        "or template it is refused. Experts and policy are not part of it and must be had separately, each under its "
        "own license; where the table above names a folder, give your own in `recipe.yaml`. Nothing is known about "
        f"prompts unlike {tasks}.\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
