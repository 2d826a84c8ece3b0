"""The dashboard and the alerts ask for what is exported, and everything that is exported is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cluster.watch import dashboards
from cluster.watch.telemetry import METRICS


def asked() -> str:
    """All queries."""
    panels = [query.expression for _, row in dashboards.ROWS for panel in row for query in panel.queries]
    return "\n".join([*panels, *(alert.expression for alert in dashboards.ALERTS)])


def test_every_exported_metric_has_a_panel_and_no_query_asks_for_another() -> None:
    names = set(re.findall(r"ray_musketeers_[a-z_]+", asked()))
    buckets = {f"{m.exported}_bucket" if m.kind == "histogram" else m.exported for m in METRICS.values()}
    assert names == buckets


def test_a_metric_that_nobody_exports_is_refused() -> None:
    with pytest.raises(KeyError):
        dashboards.of("reward_median")


def test_panels_can_be_embedded_as_ray_s_are() -> None:
    made = dashboards.dashboard()
    numbers = [panel["id"] for panel in made["panels"]]
    assert len(set(numbers)) == len(numbers) and made["uid"] == dashboards.UID
    assert {variable["name"] for variable in made["templating"]["list"]} == {"datasource", "SessionName", "run"}
    drawn = [panel for panel in made["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in drawn)
    assert all("SessionName" in target["expr"] for panel in drawn for target in panel["targets"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in made["panels"]]
    assert len(set(places)) == len(places), "panels lie on each other"


def test_alerts_are_for_every_run_and_say_which() -> None:
    for rule in dashboards.alerts()["groups"][0]["rules"]:
        assert "$run" not in rule["expr"] and "$SessionName" not in rule["expr"]
        assert "$labels.run" in rule["annotations"]["summary"]


def test_the_files_name_each_other(tmp_path: Path) -> None:
    written = dashboards.write(tmp_path / "out", tmp_path / "ray")
    assert all(path.is_file() for path in written)
    prometheus = (tmp_path / "out" / "prometheus" / "prometheus.yml").read_text()
    assert str(tmp_path / "out" / "prometheus" / "alerts.yml") in prometheus
    assert str(tmp_path / "ray" / "prom_metrics_service_discovery.json") in prometheus
    assert json.loads((tmp_path / "out" / "grafana" / "dashboards" / "musketeers.json").read_text())["panels"]
