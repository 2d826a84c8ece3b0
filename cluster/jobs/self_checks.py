"""The doctor's look at a recipe's models: each is loaded here, one after the other, and checked as by its workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, TypeVar

import psutil

from cluster.config import RunConfig
from cluster.jobs.findings import GIB, Check
from cluster.run.preflight import model_facts
from cluster.run.start import expert_recipes, rollout_recipes
from experts.config import EngineConfig
from experts.expert import Expert
from experts.loading import ModelError, load_frozen
from experts.selfcheck import REMEDIES, Finding
from learner.selfcheck import check_learner
from rollout.worker import RolloutWorker

Settings = TypeVar("Settings", bound=EngineConfig)
COPIES = 2.0  # of the stored weights that loading takes, at most: they may be in half the precision asked for


def self_checks(config: RunConfig) -> list[Check]:
    """A row for every property of every distinct model; the models must be there."""
    facts, seen, found = model_facts(config), dict[str, str](), list[Check]()
    for index, (expert, (recipe, *_)) in enumerate(zip(config.experts, expert_recipes(config), strict=True)):
        key, same = f"experts.{index}", _unchecked(expert).model_copy(update={"name": ""}).model_dump_json()
        if same in seen:
            found.append(Check(key, True, f"self-check: the same as {seen[same]}"))
            continue
        seen[same] = key

        def of_expert(recipe: Any = recipe) -> Sequence[Finding]:
            settings, *others = recipe.args
            with closing(Expert(_unchecked(settings), *others)) as loaded:
                return loaded.self_check()

        found += _rows(key, facts, of_expert)
    return found + _rows("policy", facts, lambda: _of_policy(config))


def _of_policy(config: RunConfig) -> list[Finding]:
    settings, path, router, *others = rollout_recipes(config)[0].args
    position, saving = router.prefix.position, config.learner.checkpoint_activations
    with closing(RolloutWorker(_unchecked(settings), path, router, *others)) as worker:
        found = worker.self_check()
        policy = worker.policy
    if settings.engine == "vllm":
        policy = load_frozen(path, settings.dtype, "cpu", "policy")
    return [*found, *check_learner(policy, position, saving)]


def _unchecked(settings: Settings) -> Settings:
    return settings.model_copy(update={"self_check": False})


def _rows(key: str, facts: dict[str, dict[str, Any]], check: Callable[[], Sequence[Finding]]) -> list[Check]:
    stored, free = facts[f"{key}.model"]["stored_bytes"], psutil.virtual_memory().available
    if not stored or COPIES * stored > free:
        why = f"{stored / GIB:.1f} GiB of weights and {free / GIB:.1f} of memory are here" if stored else "not here yet"
        return [Check(key, True, f"self-check: left to the workers, when they start: {why}")]
    try:
        found = check()
    except ModelError as error:
        return [Check(key, False, str(error), "see docs/models.md")]
    return [Check(f"{key}: {each.name}", each.ok, each.detail, REMEDIES[each.name]) for each in found]
