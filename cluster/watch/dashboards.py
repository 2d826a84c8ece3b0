"""The Grafana dashboard, the alerts and Prometheus' configuration, made from one list of queries.

The dashboard has the form of Ray's own: panels with fixed numbers, under a `uid`, asked through the variables
`datasource` and `SessionName`, so that it stands beside Ray's and can be embedded like them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.watch.telemetry import METRICS

UID = "musketeersDashboard"
TITLE = "n-Musketeers"
CHOSEN = 'run=~"$run",SessionName=~"$SessionName"'
WIDTH, HEIGHT = 8, 8
SCRAPE_S = 10


def of(name: str, labels: str = "") -> str:
    """The series of a metric of `telemetry.METRICS`, of the chosen runs.

    Raises:
        KeyError: when nobody exports it.
    """
    return f"{METRICS[name].exported}{{{CHOSEN}{',' if labels else ''}{labels}}}"


@dataclass(frozen=True)
class Query:
    """What a panel draws, and what its lines are called."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A chart.  unit: Grafana's name of it.  heat: a heat map of a histogram instead of lines."""

    title: str
    text: str
    queries: tuple[Query, ...]
    unit: str = "short"
    most: float | None = None
    heat: bool = False


@dataclass(frozen=True)
class Alert:
    """Fires when `expression` has been above (or below) a limit for a while.

    minutes: how long.
    """

    name: str
    expression: str
    beyond: str
    minutes: int
    text: str

    @property
    def rule(self) -> dict[str, Any]:
        """As Prometheus wants it."""
        return {
            "alert": self.name,
            "expr": f"{everywhere(self.expression)} {self.beyond}",
            "for": f"{self.minutes}m",
            "labels": {"severity": "warning"},
            "annotations": {"summary": self.text},
        }


def _one(name: str, legend: str) -> tuple[Query, ...]:
    return (Query(of(name), legend),)


def _same(*names: str) -> tuple[Query, ...]:
    return tuple(Query(of(name), f"{{{{run}}}} {name}") for name in names)


ROWS: Sequence[tuple[str, Sequence[Panel]]] = (
    ("Learning", (
        Panel("Reward", "Mean reward of the completions of the last step.", _one("reward_mean", "{{run}}")),
        Panel("Reward by task", "The same, task by task.", _one("task_reward", "{{run}} {{task}}")),
        Panel("Progress", "Share of the planned updates that are done.",
              (Query(f"{of('step')} / {of('steps_planned')}", "{{run}}"),), "percentunit", 1.0),
        Panel("Groups without signal", "Share of groups whose completions all got the same reward: they teach nothing.",
              (*_same("groups_no_signal"), *_same("groups_filtered")), "short"),
        Panel("KL and entropy", "Nats a token: KL to the reference, and entropy of the policy.",
              _same("policy_kl", "policy_entropy")),
        Panel("Clipping and correction", "Shares of tokens or completions that the algorithm's limits touch.",
              _same("policy_clip_fraction", "policy_clipped_completions_fraction", "policy_corrected_fraction",
                    "policy_kl_clamped_fraction", "policy_truncated_fraction"), "percentunit"),
        Panel("Engine against learner", "Difference of their log-probabilities, nats a token; and the mean ratio.",
              _same("policy_logprob_mismatch", "policy_logprob_mismatch_max", "policy_ratio")),
        Panel("Gradient norm and loss", "Of the router, before clipping.", _same("router_grad_norm", "loss")),
        Panel("Spread of rewards", "Standard deviation in the last step.", _same("reward_std")),
    )),
    ("Collaboration", (
        Panel("Attention on the experts", "Share of attention, by task and expert.",
              _one("attention", "{{task}} on {{expert}}"), "percentunit", 1.0),
        Panel("Attention entropy", "Nats: 0 is one expert alone.", _same("router_attention_entropy")),
        Panel("Size of the prefix", "Against the policy's token embeddings.", _same("router_prefix_rms_ratio")),
        Panel("Curriculum", "Level that prompts are issued from, for tasks that have a curriculum.",
              _one("curriculum_level", "{{run}} {{task}}")),
    )),
    ("Pipeline", (
        Panel("Prompts under way", "In some stage, and finished groups that wait for their update.",
              _one("prompts", "{{run}} {{state}}")),
        Panel("Age of the oldest", "Of the calls under way and of the finished groups.",
              _one("oldest_seconds", "{{run}} {{state}}"), "s"),
        Panel("Staleness", "Groups by how many updates old they were when trained.",
              (Query(f"sum by (le) (increase({METRICS['staleness'].exported}_bucket{{{CHOSEN}}}[5m]))", "{{le}}"),),
              heat=True),
        Panel("Staleness of a step", "Mean and largest.", _same("staleness_mean", "staleness_max")),
        Panel("Router version", "That sampled the last step's groups.", _same("router_version")),
        Panel("Seconds by stage", "Of the last step; stages overlap.", _one("stage_seconds", "{{run}} {{stage}}"), "s"),
        Panel("Idle share", "Of the last step, by stage.", _one("stage_idle_share", "{{run}} {{stage}}"),
              "percentunit", 1.0),
        Panel("Seconds a step", "Wall-clock.", _same("time_step_s"), "s"),
        Panel("Tokens a second", "Completion tokens.", _same("rollout_tokens_per_second")),
        Panel("Feature cache", "Share of features that were known.", _same("cache_hit_rate"), "percentunit", 1.0),
    )),
    ("Verifiers and workers", (
        Panel("Verdicts", "Completions a second, by task and how scoring ended.",
              (Query(f"sum by (run, task, status) (rate({of('verdicts_total')}[5m]))", "{{task}} {{status}}"),)),
        Panel("Masked and unreadable completions", "Shares without a verdict (left out), and wrong as unreadable.",
              (*_same("rewards_masked_fraction", "rewards_unreadable_fraction"),
               *_one("task_masked_fraction", "{{run}} {{task}}"),
               *_one("task_unreadable_fraction", "{{run}} {{task}} unreadable")), "percentunit"),
        Panel("Workers", "By kind and state.", _one("workers", "{{kind}} {{state}}")),
        Panel("Calls by worker", "One at work and the others waiting.", _one("worker_calls", "{{worker}}")),
        Panel("Oldest call by worker", "How long it has been there.", _one("worker_seconds", "{{worker}}"), "s"),
        Panel("Restarts", "Of workers, so far.", _one("worker_restarts", "{{worker}}")),
        Panel("Prompts given up", "After repeated failures; see dead_letters.jsonl.", _same("prompts_dead")),
        Panel("News", "Seconds since the driver last said how things are, and since the last step.",
              (Query(f"time() - {of('seen_timestamp_seconds')}", "{{run}} driver"),
               Query(f"time() - {of('stepped_timestamp_seconds')}", "{{run}} step")), "s"),
    )),
)  # fmt: skip

ALERTS: Sequence[Alert] = (
    Alert("EngineAndLearnerDisagree", of("policy_logprob_mismatch"), "> 0.1", 5,
          "run {{ $labels.run }}: engine and learner differ by {{ $value }} nats a token"),
    Alert("NoLearningSignal", of("groups_no_signal"), "> 0.8", 10,
          "run {{ $labels.run }}: {{ $value | humanizePercentage }} of the groups teach nothing"),
    Alert("RewardsMasked", of("rewards_masked_fraction"), "> 0.01", 5,
          "run {{ $labels.run }}: {{ $value | humanizePercentage }} of the completions have no verdict"),
    # Of a single expert there is nothing to collapse to.
    Alert("AttentionCollapse",
          f"(max by (run) (avg by (run, expert) ({of('attention')}))"
          f" unless on (run) (count by (run) (count by (run, expert) ({of('attention')})) == 1))", "> 0.95", 15,
          "run {{ $labels.run }}: one expert has {{ $value | humanizePercentage }} of the attention over all tasks"),
    Alert("RunStalls", f"time() - {of('stepped_timestamp_seconds')}", "> 900", 1,
          "run {{ $labels.run }}: no step for {{ $value | humanizeDuration }}"),
)  # fmt: skip


def everywhere(expression: str) -> str:
    """A query of the dashboard for all runs and sessions, as Prometheus understands it."""
    return expression.replace("$run", ".*").replace("$SessionName", ".*")


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(_row(title, len(panels) + 1, top))
        top += 1
        for index, panel in enumerate(row):
            place = {"x": index % 3 * WIDTH, "y": top + index // 3 * HEIGHT, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        top += -(-len(row) // 3) * HEIGHT
    return {
        "title": TITLE,
        "uid": UID,
        "version": 1,
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "tags": ["ray"],
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "",
        "annotations": {"list": []},
        "templating": {"list": [_source(), _variable("SessionName", "Ray session"), _variable("run", "run")]},
        "panels": panels,
    }


def alerts() -> dict[str, Any]:
    """Prometheus' rules."""
    return {"groups": [{"name": "n-musketeers", "rules": [alert.rule for alert in ALERTS]}]}


def prometheus(discovery: Path, rules: Path) -> dict[str, Any]:
    """Prometheus' configuration.

    discovery: the list of nodes that Ray keeps.
    """
    return {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)]}]}],
    }


def write(folder: Path, ray: Path, prometheus_url: str = "http://127.0.0.1:9090") -> list[Path]:
    """Writes everything that Prometheus and Grafana need; returns the files.

    Args:
        ray: the folder that Ray keeps its sessions in, such as /tmp/ray.
    """
    folder = folder.absolute()
    rules = folder / "prometheus" / "alerts.yml"
    grafana = folder / "grafana"
    provisioning = grafana / "provisioning"
    source = {"name": "Prometheus", "type": "prometheus", "url": prometheus_url, "access": "proxy", "isDefault": True}
    providers = [
        _provider("n-Musketeers", grafana / "dashboards"),
        _provider("Ray", ray / "session_latest" / "metrics" / "grafana" / "dashboards"),
    ]
    texts = {
        folder / "prometheus" / "prometheus.yml": yaml.safe_dump(
            prometheus(ray / "prom_metrics_service_discovery.json", rules), sort_keys=False
        ),
        rules: yaml.safe_dump(alerts(), sort_keys=False, width=200),
        grafana / "dashboards" / "musketeers.json": json.dumps(dashboard(), indent=1) + "\n",
        provisioning / "dashboards" / "default.yml": yaml.safe_dump({"apiVersion": 1, "providers": providers}),
        provisioning / "datasources" / "default.yml": yaml.safe_dump({"apiVersion": 1, "datasources": [source]}),
        # As Ray's own: its dashboard shows Grafana's panels in frames, to people who may look at it.
        grafana / "grafana.ini": (
            "[server]\nhttp_addr = 127.0.0.1\n[analytics]\nreporting_enabled = false\ncheck_for_updates = false\n"
            "[security]\nallow_embedding = true\n[auth.anonymous]\nenabled = true\norg_role = Viewer\n"
            f"[paths]\nprovisioning = {provisioning}\ndata = {grafana / 'data'}\nlogs = {grafana / 'logs'}\n"
        ),
    }
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return list(texts)


def _provider(name: str, folder: Path) -> dict[str, Any]:
    return {"name": name, "folder": name, "type": "file", "options": {"path": str(folder)}}


def _row(title: str, number: int, top: int) -> dict[str, Any]:
    place = {"x": 0, "y": top, "w": 24, "h": 1}
    return {"type": "row", "id": number, "title": title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "expr": query.expression,
            "legendFormat": query.legend,
            "format": "heatmap" if panel.heat else "time_series",
        }
        for index, query in enumerate(panel.queries)
    ]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0} if panel.most is not None else {"unit": panel.unit}
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "type": "heatmap" if panel.heat else "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.text,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {} if panel.heat else {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": targets,
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "hide": 2, "refresh": 1}


def _variable(name: str, label: str) -> dict[str, Any]:
    query = f"label_values({METRICS['step'].exported}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
