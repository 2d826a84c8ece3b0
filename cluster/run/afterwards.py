"""What is done with a finished run: measuring it again, and replaying one of its steps."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import EvaluationConfig, RunConfig
from cluster.run import checkpoint, groups, substitution
from cluster.run.ablation import Intervention
from cluster.run.asked import asked_by
from cluster.run.baselines import KnownBaselines, fingerprints
from cluster.run.evaluate import Evaluator, digest_of
from cluster.run.folder import RunFolder, RunFolderError
from cluster.run.models import ensure_models
from cluster.run.preflight import check_models, check_prompts
from cluster.run.reporting import attention_by_task, report_run
from cluster.run.start import Started, start_inline
from cluster.watch import ablation, logs, passes
from cluster.watch.ablation import Ablation
from cluster.watch.ablation_figure import ablation_figure
from cluster.watch.tables import print_results
from experts.expert import whole
from experts.router import router_class
from experts.standins import read_stand_ins, write_stand_ins
from learner.batch import global_denominators
from rewards.sources import Task, build_tasks
from rewards.stream import PromptStream
from rollout.types import Group

REPLAY_TOLERANCE = 1e-3


def _open(
    run: Path, saved_at: checkpoint.Checkpoint, console: Console
) -> tuple[RunConfig, RunFolder, dict[str, Task], Started]:
    """A run's configuration, folder, tasks, and its workers in this process.

    Raises:
        ValueError: also when its prompts are no longer those that it was trained on.
    """
    folder = RunFolder(run)
    saved = folder.saved_config()
    config = RunConfig.model_validate(
        saved.model_dump()
        | {
            "execution": "inline",
            "learner": saved.learner.model_dump() | {"ranks": 1},
            "policy": saved.policy.model_dump() | {"workers": 1},
            "rewards": saved.rewards.model_dump() | {"workers": 1},
            "experts": [expert.model_dump() | {"replicas": 1} for expert in saved.experts],
        }
    )
    tasks = build_tasks(config.data)
    note = partial(console.print, highlight=False, soft_wrap=True)
    ensure_models(config, note)
    check_models(config)
    tasks = check_prompts(config, tasks, lambda note: None)
    folder.check_data(PromptStream(tasks, config.data), saved_at.driver, note)
    started = start_inline(config, {name: task.verifier for name, task in tasks.items()})
    started.fleet.asked = asked_by(config, tasks)
    return config, folder, tasks, started


@dataclass(frozen=True)
class Asked:
    """What of a run is to be measured: which checkpoint (None: the last), on which prompts of which split."""

    run: Path
    step: int | None
    split: str
    prompts: int | None

    def checkpoint(self) -> checkpoint.Checkpoint:
        """The checkpoint.

        Raises:
            ValueError: when there is no such run or checkpoint, or the split is unknown.
        """
        if self.split not in ("test", "validation"):
            raise RunFolderError(f"--split {self.split!r} is neither test nor validation")
        folder = RunFolder(self.run)
        folder.saved_config()
        return checkpoint.read(folder.checkpoints, self.step)


def ablate_run(asked: Asked, console: Console) -> None:
    """Prints what interventions cost a run's router; writes `ablation.json` and `ablation.png` into its folder.

    Raises:
        ValueError: as `Asked.checkpoint`, and when the collaborator reads no states.
    """
    saved = asked.checkpoint()
    kind = RunFolder(asked.run).saved_config().router.kind
    if getattr(router_class(kind), "asks", "states") != "states":
        raise RunFolderError(f"{asked.run}: a collaborator of kind {kind} reads no states: there is nothing to ablate")
    config, folder, tasks, started = _open(asked.run, saved, console)

    async def measure() -> Ablation:
        known = KnownBaselines(config, tasks, fingerprints(started.experts, started.policy))
        evaluator = Evaluator(config, started.fleet, tasks, known)
        prompts = evaluator.prompts(asked.split, asked.prompts or config.evaluation.prompts)
        router = saved.learner.snapshot
        stand_ins = read_stand_ins(asked.run, router.checksum)
        if stand_ins is None and substitution.possible(evaluator):
            candidates = config.evaluation.stand_ins or EvaluationConfig().stand_ins
            stand_ins = (await substitution.find(evaluator, started.fleet, router, candidates)).stand_ins
            if saved.step == checkpoint.steps(folder.checkpoints)[-1]:  # the router that is served
                write_stand_ins(folder.path, router.checksum, stand_ins)
        return await Intervention(evaluator, started.fleet, prompts, router, stand_ins or {}).measured()

    try:
        with console.status("answering under every intervention"):
            found = asyncio.run(measure()).as_data()
    finally:
        started.fleet.close()
    found = {"step": saved.step, "split": asked.split, **found}
    ablation.write(found, folder.path / "ablation.json")
    ablation_figure(found, folder.path / "ablation.png")
    console.print(ablation.table(found))
    for line in ablation.said(found):
        console.print(line, highlight=False)
    report = report_run(asked.run) if folder.summary.is_file() else folder.path / "ablation.png"
    console.print(f"{folder.path / 'ablation.json'}   {report}", highlight=False, soft_wrap=True)


def evaluate_run(asked: Asked, samples: int | None, console: Console) -> None:
    """Prints the table of a run's router, controls and baselines; adds a line to its `eval.jsonl`.

    Args:
        samples: answers to every prompt at the run's temperature, for pass@k; None means as many as in training.

    Raises:
        ValueError: as `Asked.checkpoint`.
    """
    saved = asked.checkpoint()
    config, folder, tasks, started = _open(asked.run, saved, console)
    count = config.sampling.samples if samples is None else samples

    async def measure() -> tuple[str, Any, dict[str, float], dict[str, Any] | None]:
        known = KnownBaselines(config, tasks, fingerprints(started.experts, started.policy))
        evaluator = Evaluator(config, started.fleet, tasks, known)
        router = saved.learner.snapshot
        chosen = evaluator.prompts(asked.split, asked.prompts or config.evaluation.prompts)
        result, attention = await evaluator.router(chosen, router)
        systems = {
            "router": result,
            "shuffled_within_task": await evaluator.shuffled(chosen, router, within_task=True),
            "shuffled": await evaluator.shuffled(chosen, router, within_task=False),
            **await evaluator.baselines(chosen, router),
        }
        right = await evaluator.sampled(chosen, router, count) if count else None
        return digest_of(chosen), systems, attention, None if right is None else passes.pass_rates(right, count)

    try:
        digest, systems, attention, sampled = asyncio.run(measure())
    finally:
        started.fleet.close()
    line = {"step": saved.step, "kind": f"again-{asked.split}", "prompts": digest}
    line |= {"systems": systems, "attention": attention}
    logs.JsonLines(folder.eval).append(line | ({"sampled": sampled} if sampled else {}))
    print_results(console, systems, attention=attention_by_task(attention))
    if sampled:
        console.print(passes.table(sampled, config.sampling.temperature, count))


def replay_step(run: Path, step: int, console: Console) -> bool:
    """Recomputes a step from its saved groups, starting at the checkpoint before it.

    Returns whether the logged gradient norm was met within a relative 1e-3.

    Raises:
        ValueError: when the step, its groups or a checkpoint before it are not there.
    """
    folder = RunFolder(run)
    folder.saved_config()
    logged = next((line for line in logs.read(folder.metrics) if line["step"] == step), None)
    before = [known for known in checkpoint.steps(folder.checkpoints) if known < step]
    if logged is None or not before:
        raise RunFolderError(f"{run} has no step {step} behind a checkpoint: it knows steps {_known(folder)}")
    missing = [s for s in range(before[-1] + 1, step + 1) if not groups.path_of(folder.groups, s).is_file()]
    if missing:
        raise RunFolderError(f"{run} has not kept the groups of step {missing[0]}: train with checkpoint.groups=true")
    saved = checkpoint.read_to_train(folder.checkpoints, before[-1])
    config, folder, tasks, started = _open(run, saved, console)
    try:
        loss, norm = _replay(config, folder, tasks, started, saved, step)
    finally:
        started.fleet.close()
    met = math.isclose(norm, logged["router/grad_norm"], rel_tol=REPLAY_TOLERANCE)
    console.print(
        f"step {step}: loss {loss:.8g} (logged {logged['loss']:.8g}), gradient norm {norm:.8g} "
        f"(logged {logged['router/grad_norm']:.8g}): {'reproduced' if met else 'NOT reproduced'}",
        highlight=False,
    )
    return met


def _replay(
    config: RunConfig,
    folder: RunFolder,
    tasks: dict[str, Task],
    started: Started,
    start: checkpoint.Checkpoint,
    step: int,
) -> tuple[float, float]:
    stream, learner = PromptStream(tasks, config.data), started.fleet.learners[0].worker  # type: ignore[attr-defined]
    learner.replaying = True
    learner.restore(start.learner, 0)
    loss = norm = 0.0
    for number in range(start.step + 1, step + 1):
        kept: list[Group] = groups.read(folder.groups, number, stream.prompt)
        encoded = whole([stage.reference for stage in started.fleet.encode([group.prompt for group in kept])])
        denominators = global_denominators(kept, config.algorithm.constant_length)
        sums = learner.backward(kept, [e.features for e in encoded if e.features], denominators)
        loss, norm = sums.values.get("loss", 0.0), learner.finish_update()
    return loss, norm


def _known(folder: RunFolder) -> str:
    steps = [line["step"] for line in logs.read(folder.metrics)]
    return f"{steps[0]} to {steps[-1]}" if steps else "none"
