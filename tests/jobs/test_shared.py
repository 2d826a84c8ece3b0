"""What a job's configuration looks like on another machine, and folders that the others do not see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, RunConfig, changed, load
from cluster.jobs.client import Job, Jobs
from cluster.jobs.shared import Seen, absolute, check_shared, digest_of, look, places

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The quickstart, seen from a folder that holds a model and a task file of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUSKETEERS_ZOO", str(tmp_path / "zoo"))
    (tmp_path / "model").mkdir()
    (tmp_path / "system.txt").write_text("Answer.")
    return load(
        ROOT / "configs" / "quickstart.yaml",
        ["root=runs", "experts.0.model=model", "experts.1.model=org/name", "data.system=system.txt"],
    )


def test_paths_of_this_machine_are_written_out_and_names_are_left(config: RunConfig, tmp_path: Path) -> None:
    made = absolute(config)
    assert made.root == str(tmp_path / "runs")
    assert [e.model for e in made.experts] == [str(tmp_path / "model"), "org/name"]
    assert made.policy.model == "zoo/composed/policy"
    assert made.data.system == str(tmp_path / "system.txt")
    started = changed(config, ["router.init=bundle"])
    assert absolute(started).router.init == str(tmp_path / "bundle")
    assert absolute(changed(config, ["router.init=hub:me/router"])).router.init == "hub:me/router"
    assert absolute(made) == made and digest_of(made) == digest_of(absolute(config))
    assert digest_of(made) != digest_of(config)


def test_places_are_the_runs_the_zoo_and_local_models(config: RunConfig, tmp_path: Path) -> None:
    assert places(config) == {
        "root": str(tmp_path / "runs"),
        "experts.0.model": str(tmp_path / "model"),
        "the zoo (MUSKETEERS_ZOO)": str(tmp_path / "zoo"),
    }


def test_a_folder_that_all_see_passes_and_leaves_nothing_behind(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    check_shared(config, lambda *asked: [look(*asked)])
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("key", ["root", "experts.0.model"])
def test_a_folder_that_another_node_does_not_see_is_refused(config: RunConfig, key: str) -> None:
    def ask(wanted: dict[str, str], marker: str) -> list[Seen]:
        return [Seen("10.0.0.1", (), ()), Seen("10.0.0.2", (key,), ())]

    with pytest.raises(ConfigError, match=rf"{key}: /.* is not the same folder on node 10.0.0.2"):
        check_shared(config, ask)


def test_another_folder_of_the_same_name_is_not_the_same_folder(config: RunConfig, tmp_path: Path) -> None:
    """Every machine has a /tmp."""
    (tmp_path / "zoo").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def ask(wanted: dict[str, str], marker: str) -> list[Any]:
        return [look({**wanted, "root": str(elsewhere)}, marker)]

    with pytest.raises(ConfigError, match=r"root: .* is not the same folder"):
        check_shared(config, ask)


def test_a_run_under_way_is_known_by_its_configuration(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def there(status: str, configuration: str) -> Jobs:
        job = Job("job", config.run, status, "", configuration, 0.0, None)
        monkeypatch.setattr(Jobs, "list", lambda self, run: [job] if run == job.run else [])
        return Jobs.__new__(Jobs)

    mine = digest_of(absolute(config))
    assert (found := there("RUNNING", mine).under_way(config)) is not None and found.id == "job"
    assert there("SUCCEEDED", mine).under_way(config) is None
    assert there("RUNNING", mine).under_way(changed(config, ["run=other"])) is None
    with pytest.raises(ConfigError, match="job job is another run named 'quickstart'"):
        there("RUNNING", "other").under_way(config)
