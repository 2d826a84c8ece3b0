"""Everything a run writes into its folder, apart from the lock and the configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from cluster.config import RunConfig
from cluster.run import checkpoint, groups
from cluster.run.evaluate import Evaluation, Evaluator, digest_of, summary_of
from cluster.run.fleet import Fault, Reference
from cluster.run.folder import RunFolder, naming
from cluster.run.reporting import attention_by_task, report_run, versions
from cluster.run.substitution import Found
from cluster.watch import logs
from cluster.watch.board import Board
from cluster.watch.live import Watch
from cluster.watch.tables import print_results, without_table
from experts.joining import is_of
from experts.state import RouterShape
from learner.learner import LearnerState
from rollout.types import Group, Prompt

if TYPE_CHECKING:
    from cluster.run.driver import Driver
    from cluster.run.start import Started


CLOSED_FOR = 50  # updates in a row without any prefix, after which a word is said


class Export(Protocol):
    """Takes every step's record somewhere else."""

    def step(self, record: dict[str, Any]) -> None:
        """One finished step."""
        ...

    def close(self) -> None:
        """After the last one."""
        ...


class Records:
    """The driver's sink: metrics, TensorBoard, groups, checkpoints, evaluations, summary and report.

    exports: others that get every step's record, such as Prometheus.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, watch: Watch, shape: RouterShape) -> None:
        self.config, self.folder, self.watch, self.shape = config, folder, watch, shape
        self.evaluator: Evaluator | None = None
        self.exports: list[Export] = []
        self.latest: dict[str, Any] = {}
        self._metrics = logs.JsonLines(folder.metrics)
        self._eval = logs.JsonLines(folder.eval)
        self._board: Board | None = None
        self._closed = 0

    def cut_back(self, step: int) -> None:
        """A resumed run writes the steps after its checkpoint again: drop them from the logs."""
        logs.cut_back(self.folder.metrics, step)
        logs.cut_back(self.folder.eval, lambda line: line["step"] <= step and line["kind"] != "after")
        self._board = Board(self.folder.path, resume_after=step)

    def history(self) -> list[dict[str, Any]]:
        """Records of the steps so far."""
        return logs.read(self.folder.metrics)

    def before(self) -> Evaluation | None:
        """The evaluation before training, when the log has it."""
        found = [line["systems"] for line in logs.read(self.folder.eval) if line["kind"] == "before"]
        return found[0] if found else None

    def step(self, record: dict[str, Any]) -> None:
        """See `Sink.step`."""
        with naming(self.folder.metrics):
            self._metrics.append(record)
        if self._board is None:
            self._board = Board(self.folder.path)
        with naming(self.folder.path / "tensorboard"):
            self._board.step(record["step"], {k: v for k, v in record.items() if k != "step"})
        self.watch.step(record)
        self.latest = record
        for export in self.exports:
            export.step(record)
        mismatch = record.get("policy/logprob_mismatch", 0.0)
        if mismatch > self.config.learner.mismatch_warning:
            self.watch.note(f"step {record['step']}: engine and learner disagree by {mismatch:.3f} nats a token")

        self._closed = self._closed + 1 if record.get("router/closed_fraction") == 1 else 0
        if self._closed == CLOSED_FOR:
            self.watch.note(
                f"step {record['step']}: the gate has been closed for every prompt of {CLOSED_FOR} updates, so the "
                "router learns nothing. Right where the frozen policy alone is best; else lower learner.learning_rate, "
                "raise algorithm.choice_after or set router.gate: false"
            )

    def groups(self, step: int, kept: list[Group]) -> None:
        """See `Sink.groups`."""
        with naming(self.folder.groups):
            groups.write(self.folder.groups, step, kept)

    def dead(self, ordinal: int, task: str, fault: Fault) -> None:
        """See `Sink.dead`."""
        letter = {"ordinal": ordinal, "task": task, "worker": fault.worker, "reason": str(fault)}
        logs.JsonLines(self.folder.dead_letters).append(letter)
        self.watch.note(f"prompt {ordinal} is given up ({self.folder.dead_letters}): {fault}")

    def checkpoint(self, step: int, learner: LearnerState, driver: dict[str, Any], finished: list[Group]) -> None:
        """See `Sink.checkpoint`."""
        kept = checkpoint.Checkpoint(step, learner, driver, finished)
        with naming(self.folder.checkpoints):
            checkpoint.write(self.folder.checkpoints, kept, self.shape, self.config.router, self.config.checkpoint.keep)
        self.folder.accept()
        self.folder.share(self.watch.note)

    async def validate(self, step: int, router: Reference) -> None:
        """See `Sink.validate`."""
        every = self.config.evaluation.every
        if self.evaluator is None or not every or step % every:
            return
        prompts = self.evaluator.prompts("validation", self.config.evaluation.validation_prompts)
        result, attention = await self.evaluator.router(prompts, router)
        self.evaluation(step, "validation", prompts, {"router": result}, attention)
        shown = ", ".join(f"{task} {accuracy:.2f}" for task, accuracy in result["tasks"].items())
        self.watch.note(f"step {step}, validation: {shown}")

    def evaluation(
        self,
        step: int,
        kind: str,
        prompts: Sequence[Prompt],
        systems: Evaluation,
        attention: Mapping[str, float] | None = None,
    ) -> None:
        """One line of `eval.jsonl`: `kind` is before, validation or after, `prompts` a hash of them."""
        line = {"step": step, "kind": kind, "prompts": digest_of(prompts), "systems": systems}
        self._eval.append(line | {"attention": dict(attention or {})})

    def close(self) -> None:
        """Ends what writes elsewhere; any number of times."""
        for export in self.exports:
            export.close()
        self.exports.clear()

    def finish(
        self,
        driver: Driver,
        frozen: list[dict[str, Any]],
        before: Evaluation,
        after: Evaluation,
        attention: dict[str, float],
        wall_s: float,
        started: Started,
        samples: list[dict[str, Any]],
        console: Console,
    ) -> None:
        """Summary, and the table people read."""
        if self._board is not None:
            self._board.close()
        self.close()
        verdict = print_results(console, after, before=before, attention=attention_by_task(attention))
        router, arrays = started.shape, _last_router(self.folder)
        new = [router.experts.index(name) for name in self.config.router.add_expert]
        self.folder.write_summary(
            {
                "run": self.config.run,
                "steps": driver.step,
                "seed": self.config.seed,
                "wall_s": wall_s,
                "train_wall_s": driver.elapsed_s,
                "samples": driver.samples,
                **driver.recovery.summary(),
                "router_parameters": sum(a.size for a in arrays.values()),
                "router_parameters_trained": sum(a.size for n, a in arrays.items() if not new or is_of(n, new)),
                "experts": list(router.experts),
                "frozen": frozen,
                "eval": summary_of(after),
                "eval_before": {"router": summary_of(before)["router"]},
                "verdict": verdict.summary(),
                "attention": attention,
                "versions": versions(),
            }
        )
        if samples or (self.folder.path / "samples.json").is_file():
            (self.folder.path / "samples.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")

    def stand_ins(self, found: Found, console: Console) -> None:
        """Adds what stands in for experts to a finished run's summary."""
        console.print(without_table(found.as_data()))
        summary = json.loads(self.folder.summary.read_text())
        self.folder.write_summary(summary | {"stand_ins": found.as_data()})

    def report(self, console: Console) -> None:
        """A finished run's page, with its figures."""
        report = report_run(self.folder.path)
        console.print(f"run folder: {self.folder.path}   report: {report}", highlight=False)


def _last_router(folder: RunFolder) -> dict[str, Any]:
    return checkpoint.read(folder.checkpoints).learner.snapshot.arrays


def baselines_of(evaluation: Evaluation) -> Evaluation:
    """The systems that training cannot change."""
    return {name: result for name, result in evaluation.items() if name != "router"}
