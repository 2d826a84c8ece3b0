"""A run's metrics for Prometheus, through the agents of its Ray cluster (names: docs/cluster.md).

`METRICS` is the one list of what is exported; the Grafana dashboard and the alerts ask for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "ray_"  # Ray puts it in front of every name
STATES = ("starting", "working", "idle")

# A step's metrics that are exported under their own names, `/` as `_`.
PLAIN = (
    "reward/mean", "reward/std", "groups/no_signal", "groups/filtered", "rewards/masked_fraction",
    "rewards/unreadable_fraction", "loss",
    "policy/kl", "policy/entropy", "policy/ratio", "policy/clip_fraction", "policy/clipped_completions_fraction",
    "policy/corrected_fraction", "policy/kl_clamped_fraction", "policy/truncated_fraction", "policy/logprob_mismatch",
    "policy/logprob_mismatch_max", "router/attention_entropy", "router/grad_norm", "router/prefix_rms_ratio",
    "router/version", "staleness/mean", "staleness/max", "rollout/tokens_per_second", "cache/hit_rate", "time/step_s",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """What Prometheus gets: `musketeers_<name>`, with the run's name and these labels."""

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"{PREFIX}musketeers_{self.name}"


def _plain_name(metric: str) -> str:
    return metric.replace("/", "_")


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        *(Metric(_plain_name(name), "gauge", f"{name} of the last step (docs/metrics.md)") for name in PLAIN),
        Metric("step", "gauge", "updates done"),
        Metric("steps_planned", "gauge", "updates the run is to do"),
        Metric("task_reward", "gauge", "mean reward of a task's completions in the last step", ("task",)),
        Metric("task_masked_fraction", "gauge", "share of a task's completions without a verdict", ("task",)),
        Metric("task_unreadable_fraction", "gauge", "share of a task's completions that are unreadable", ("task",)),
        Metric("verdicts_total", "counter", "completions by how scoring ended", ("task", "status")),
        Metric("curriculum_level", "gauge", "level that prompts are issued from", ("task",)),
        Metric("attention", "gauge", "share of attention", ("task", "expert")),
        Metric("stage_seconds", "gauge", "seconds that a stage worked in the last step", ("stage",)),
        Metric("stage_idle_share", "gauge", "share of the last step in which a stage did nothing", ("stage",)),
        Metric("staleness", "histogram", "updates between the router that produced a group and its training"),
        Metric("prompts", "gauge", "prompts in some stage, and finished groups that wait", ("state",)),
        Metric("oldest_seconds", "gauge", "age of the oldest of these", ("state",)),
        Metric("prompts_dead", "gauge", "prompts given up so far"),
        Metric("worker_calls", "gauge", "calls that a worker has, one at work and the others waiting", ("worker",)),
        Metric("worker_seconds", "gauge", "how long a worker's oldest call has been with it", ("worker",)),
        Metric("workers", "gauge", "workers by kind and state", ("kind", "state")),
        Metric("worker_restarts", "gauge", "times a worker was started again so far", ("worker",)),
        Metric("seen_timestamp_seconds", "gauge", "when the driver last said how things are"),
        Metric("stepped_timestamp_seconds", "gauge", "when the last step was done"),
    )
}


class Telemetry:
    """Exports one run.  Both a sink of steps and an outlet of moments.

    labels: of every metric, such as the run's name.
    max_staleness: of the run, which the histogram's buckets follow.
    """

    def __init__(self, run: str, steps: int, max_staleness: int) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._run, self._steps = {"run": run}, steps
        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge}
        self._made: dict[str, Any] = {}
        for metric in METRICS.values():
            keys = {"description": metric.text, "tag_keys": ("run", *metric.labels)}
            if metric.kind == "histogram":
                # A boundary of 0 is not allowed; 0.5 holds the groups of the current router.
                edges = [age + 0.5 for age in range(max_staleness + 1)]
                self._made[metric.name] = Histogram(f"musketeers_{metric.name}", boundaries=edges, **keys)
            else:
                self._made[metric.name] = kinds[metric.kind](f"musketeers_{metric.name}", **keys)
        self._stepped = 0.0
        self._step = -1
        self._values: dict[tuple[str, tuple[str, ...]], tuple[float, dict[str, str]]] = {}

    def step(self, record: Mapping[str, Any]) -> None:
        """Exports a finished step."""
        for name in PLAIN:
            if name in record:
                self._set(_plain_name(name), record[name])
        for name, value in record.items():
            match name.split("/"):
                case ["reward", task] if task not in ("mean", "std"):
                    self._set("task_reward", value, task=task)
                case ["rewards", ("masked_fraction" | "unreadable_fraction") as share, task]:
                    self._set(f"task_{share}", value, task=task)
                case ["verdicts", task, status]:
                    # A counter that is there from the start, so that its rate is 0 and not missing.
                    self._made["verdicts_total"].inc(value or 1e-9, self._run | {"task": task, "status": status})
                case ["curriculum", task]:
                    self._set("curriculum_level", value, task=task)
                case ["attention", task, expert]:
                    self._set("attention", value, task=task, expert=expert)
                case ["time", stage] if stage != "step_s":
                    self._set("stage_seconds", value, stage=stage.removesuffix("_s"))
                case ["idle", stage]:
                    self._set("stage_idle_share", value, stage=stage)
        version = int(record["router/version"])
        for made in record["versions"]:
            # An observation of 0 is refused; every age lies in the bucket of its number.
            self._made["staleness"].observe(max(version - made, 1e-9), self._run)

    def close(self) -> None:
        """Ray's agent forgets the metrics with this process."""

    def now(self, moment: Any) -> None:
        """Exports a moment; see `cluster.run.monitor.Now`."""
        if moment.step != self._step:
            self._step, self._stepped = moment.step, moment.time
        self._set("step", moment.step)
        self._set("steps_planned", self._steps)
        for state, count, oldest in (
            ("running", moment.running, moment.oldest_running_s),
            ("waiting", moment.waiting, moment.oldest_waiting_s),
        ):
            self._set("prompts", count, state=state)
            self._set("oldest_seconds", oldest, state=state)
        self._set("prompts_dead", moment.dead)
        self._set("seen_timestamp_seconds", moment.time)
        self._set("stepped_timestamp_seconds", self._stepped)
        counts = {(kind(w.name), state): 0 for w in moment.workers for state in STATES}
        for worker in moment.workers:
            counts[kind(worker.name), worker.state] += 1
            self._set("worker_calls", worker.calls, worker=worker.name)
            self._set("worker_seconds", worker.since_s, worker=worker.name)
            self._set("worker_restarts", worker.restarts, worker=worker.name)
        for (what, state), count in counts.items():
            self._set("workers", count, kind=what, state=state)
        # Ray forgets a gauge that nobody sets for half a minute, and a step may take longer.
        for (name, _), (value, tags) in self._values.items():
            self._made[name].set(value, tags)

    def _set(self, name: str, value: Any, **labels: str) -> None:
        """Takes effect with the next moment."""
        self._values[name, tuple(labels.values())] = float(value), self._run | labels


def kind(worker: str) -> str:
    """Such as `Expert` of `Expert(arithmetic, replica 1)`."""
    return worker.partition("(")[0]
