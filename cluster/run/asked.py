"""What a run asks its experts about a prompt: states or answers, of the prompt itself or, in a control, of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.config import RunConfig
from experts.router import Asks, router_class
from rewards.sources import Task
from rollout.draws import generator
from rollout.types import Prompt

Donors = Callable[[Sequence[Prompt]], Sequence[Prompt]]
TRIES = 100  # random donors, until one has another answer


def themselves(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Every prompt's own states."""
    return prompts


@dataclass(frozen=True)
class Asked:
    """what: the collaborator wants of the experts.  donors: the prompts that they are shown for some prompts.

    answer_tokens: at most, of an answer.
    """

    what: Asks = "states"
    donors: Donors = themselves
    answer_tokens: int = 1


def asked_by(config: RunConfig, tasks: Mapping[str, Task]) -> Asked:
    """What the configured collaborator asks."""
    what: Asks = getattr(router_class(config.router.kind), "asks", "states")
    donors: Donors = themselves
    if config.router.states == "task":
        firsts = {name: task.train[0] for name, task in tasks.items() if task.train}

        def donors(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
            return [firsts[prompt.task] for prompt in prompts]

    elif config.router.states != "own":
        within, seed = config.router.states == "shuffled_within_task", config.data.seed
        everything = [prompt for task in tasks.values() if task.config.weight > 0 for prompt in task.train]

        def donors(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
            pools = [tasks[prompt.task].train if within else everything for prompt in prompts]
            return [_another(prompt, pool, seed) for prompt, pool in zip(prompts, pools, strict=True)]

    return Asked(what, donors, answer_tokens(config))


def answer_tokens(config: RunConfig) -> int:
    """Tokens that an expert's answer has at most, where the policy reads it."""
    return config.router.text.max_new_tokens or config.sampling.max_new_tokens


def _another(prompt: Prompt, pool: Sequence[Prompt], seed: int) -> Prompt:
    """A prompt with another answer, the same one whenever this prompt comes."""
    rng = generator(seed, prompt.key, "donor")
    for _ in range(TRIES):
        found = pool[int(rng.integers(len(pool)))]
        if found.answer != prompt.answer:
            return found
    return found
