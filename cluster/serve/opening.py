"""A trained collaborator made ready to answer: its configuration as it is to run, and models that were looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import ConfigError, RunConfig, changed
from cluster.keys import flat, matches
from cluster.run.models import ensure_models
from cluster.run.preflight import check_models
from cluster.run.trained import Trained, open_trained
from experts.state import RouterError, RouterShape
from rewards.prompts import prompt_of
from rollout.types import Message

# What may differ from training: where and how fast models run.  Models elsewhere must be the same ones.
CHANGEABLE = (
    "experts",
    "policy",
    "cache",
    "threads",
    "ray",
    "sampling.max_new_tokens",
    "sampling.temperature",
    "sampling.stop",
)


@dataclass(frozen=True)
class Ready:
    """A trained collaborator, and the configuration it is to run with."""

    trained: Trained
    config: RunConfig
    shape: RouterShape

    def messages(self, question: str) -> tuple[Message, ...]:
        """A question as the run's prompts were: under `data.template`, behind its system message."""
        data = self.config.data
        task = data.tasks[0].model_copy(update={"template": None})
        return prompt_of(task, data, question=question, answer="", payload={}).messages

    def with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """A conversation behind the run's system message, unless it has one of its own."""
        if any(message["role"] == "system" for message in messages):
            return tuple(messages)
        return (*(m for m in self.messages("") if m["role"] == "system"), *messages)


def ready(place: str | Path, step: int | None = None, overrides: Sequence[str] = ()) -> Ready:
    """Reads a run or a bundle, builds its zoo if that is missing, and looks at the models' files.

    Raises:
        ValueError: one line, when something is missing, or an override would change what was trained.
    """
    trained = open_trained(place, step)
    config = trained.config.model_copy(update={"execution": "ray"})
    if overrides:
        before = flat(config.model_dump(mode="json"))
        config = changed(config, overrides)
        after = flat(config.model_dump(mode="json"))
        differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        if fixed := [key for key in differing if not matches(key, CHANGEABLE) or key.startswith("policy.lora")]:
            raise ConfigError(
                f"{fixed[0]} cannot be changed any more: {trained.place} was trained with it "
                f"(what can be: {', '.join(CHANGEABLE)})"
            )
    ensure_models(config)
    check_models(config)
    check_settings(trained)
    return Ready(trained, config, _shape(trained.meta, config))


def check_settings(trained: Trained) -> None:
    """Refuses a recipe that says something else about the router than what was saved with its weights.

    Raises:
        RouterError: naming the key.
    """
    saved, here = trained.meta["config"], trained.config.router.model_dump(mode="json")
    for key in ("kind", "width", "latents", "heads", "feedforward", "prefix", "gate", "null_expert"):
        if (saved.get(key) or None) != (here[key] or None):
            other = f"its recipe has router.{key} {here[key]}, but its weights were saved with {saved.get(key)}"
            raise RouterError(f"{trained.place}: {other}")


def _shape(meta: dict[str, Any], config: RunConfig) -> RouterShape:
    """What the saved router belongs to; workers compare their models with it."""
    experts, policy = meta["experts"], meta["policy"]
    return RouterShape(
        experts=tuple(expert["name"] for expert in experts),
        widths=tuple(expert["width"] for expert in experts),
        layers=tuple(expert["layer"] for expert in experts),
        expert_fingerprints=tuple(expert["fingerprint"] for expert in experts),
        policy_width=policy["width"],
        policy_fingerprint=policy["fingerprint"],
        embedding_rms=meta["embedding_rms"],
        norms=tuple(expert.norm for expert in config.experts),
    )
