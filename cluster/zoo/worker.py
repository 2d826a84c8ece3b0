"""A process that trains models of a recipe: `python -m cluster.zoo.worker FOLDER PARENT`.

It reads names of models from standard input, one a line, and saves each in the folder, where the
recipe lies; `+` asks for a measurement of the saved models together.  Progress and results go to
standard output, one JSON object a line.  The worker ends with its input, or with its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cluster.zoo.recipe import ExpertRecipe, PolicyRecipe, Recipe, ZooError
from rewards.sources import Task, build_tasks

TOGETHER = "+"
ANSWER_REPEATS = 200
TOKENIZER_TEXTS = 4000  # a task; more change nothing but the time


def main(folder: Path, parent: int) -> None:
    """Does one job after the other."""
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    warnings.filterwarnings("ignore", message="The value of the smallest subnormal")
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text(encoding="utf-8"))
    tasks = build_tasks(recipe.data)
    models = {model.name: model for model in recipe.models}
    out = Reporter()
    wall, cpu = time.perf_counter(), 0.0
    for line in sys.stdin:
        job = line.strip()
        if job == TOGETHER:
            result: dict[str, Any] = {"accuracy": together(recipe, tasks, folder)}
        else:
            result = make(recipe, models[job], tasks, folder / job, out)
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        wall, cpu = time.perf_counter(), time.process_time()
        out.send(result=result | {name: round(value, 1) for name, value in spent.items()})


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Reporter:
    """Writes the lines of the parent; of progress, at most a few a second."""

    def __init__(self) -> None:
        self._next = 0.0
        self._lines = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is for the log

    def send(self, **message: Any) -> None:
        """One line to the parent."""
        print(json.dumps(message), file=self._lines, flush=True)

    def step(self, step: int, loss: float) -> None:
        """Tells how far training is."""
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + 0.3
            self.send(step=step, loss=round(loss, 4))


def make(
    recipe: Recipe, model: ExpertRecipe | PolicyRecipe, tasks: dict[str, Task], folder: Path, out: Reporter
) -> dict[str, Any]:
    """Trains a model, saves it into `folder` and returns its measured accuracies and size."""
    import torch

    from cluster.zoo.corpus import ExpertCorpus, PolicyCorpus
    from cluster.zoo.evaluation import expert_accuracy, policy_accuracy
    from cluster.zoo.models import new_model, train_tokenizer
    from cluster.zoo.training import train

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng([recipe.seed, *model.name.encode()])
    torch.manual_seed(int(rng.integers(2**31)))
    tokenizer = train_tokenizer(model.tokenizer, tokenizer_texts(model, tasks))
    network = new_model(model.model, tokenizer)
    pad_id = tokenizer.pad_token_id
    accuracy: dict[str, dict[str, float]]
    if isinstance(model, PolicyRecipe):
        policy = PolicyCorpus(model, tasks, tokenizer)
        done = 0
        if model.warm:
            train(network, model.warm, policy.draw_warm, rng, pad_id, out.step)
            done = model.warm.steps
        train(network, model.training, policy.draw, rng, pad_id, lambda step, loss: out.step(done + step, loss))
        accuracy = policy_accuracy(network, tokenizer, tasks, policy.hints, recipe.evaluate)
    else:
        expert = ExpertCorpus(model, tasks, tokenizer)
        train(network, model.training, expert.draw, rng, pad_id, out.step)
        accuracy = {"greedy": expert_accuracy(network, tokenizer, tasks, model, recipe.evaluate)}
    save(network, tokenizer, folder)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"accuracy": accuracy, "parameters": parameters, "vocabulary": len(tokenizer)}


def tokenizer_texts(model: ExpertRecipe | PolicyRecipe, tasks: dict[str, Task]) -> list[str]:
    """Prompts of the mixture, and its answers often enough to become tokens while the vocabulary has room."""
    prompts = [prompt for name in model.mixture for prompt in tasks[name].train[:TOKENIZER_TEXTS]]
    return [prompt.text for prompt in prompts] + sorted({prompt.answer for prompt in prompts}) * ANSWER_REPEATS


def save(network: Any, tokenizer: Any, folder: Path) -> None:
    """Writes an ordinary Hugging Face folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    network.eval()
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Writes a tokenizer beside a model's `config.json`, so that transformers reads it back whatever the model is.

    transformers 5 reads a tokenizer beside models of some types (Qwen2, Phi-3) as their own, with other splits,
    whatever class its configuration names, unless an auto_map points at code in the folder.  Code that nobody asked to
    run (`trust_remote_code`) is not looked for, and then the class counts; so the auto_map names that class.

    Raises:
        ZooError: when it is read back as another one.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoTokenizer": [None, f"transformers.{settings['tokenizer_class']}"]}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        raise ZooError(f"transformers reads the tokenizer of {folder.name} back as another one: use version 5.19")


def together(recipe: Recipe, tasks: dict[str, Task], folder: Path) -> dict[str, float]:
    """Accuracy of the saved policy with the saved experts' own answers as its hint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cluster.zoo.evaluation import collaboration_accuracy
    from cluster.zoo.hints import Hints

    torch.set_num_threads(1)

    def load(name: str) -> tuple[Any, Any]:
        return AutoModelForCausalLM.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)

    policy = load(recipe.policy.name)
    experts = {expert.task: load(expert.name) for expert in recipe.experts}
    return collaboration_accuracy(policy, experts, tasks, Hints(recipe.policy.hint, tasks, policy[1]), recipe.evaluate)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
