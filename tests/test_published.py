"""Published runs come back as they were, and are neither lost nor mixed up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cluster.config import ConfigError, load
from cluster.run.folder import RunFolder
from cluster.run.sweep import Arm, Point, grid, named_arms, tuning
from cluster.watch.comparison import Run
from cluster.watch.results import LABELS
from cluster.zoo import paths
from experts.loading import load_frozen, weights_sha256
from scripts.published import names, publish, restore, same_models
from scripts.results import DATA, NOTICE, PAGE, ROOT, SECTIONS, START, Section, with_notice
from tests.models import make

RECIPE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def point(root: Path, name: str, *overrides: str) -> Point:
    """A run of the quickstart."""
    every = (f"root={root}", f"run={name}", *overrides)
    return Point(load(RECIPE, every), every, Arm("", ()))


def ran(root: Path, name: str, *overrides: str) -> Path:
    """The folder that it leaves."""
    config = point(root, name, *overrides).config
    config.folder.mkdir(parents=True)
    texts = {
        "config.yaml": yaml.safe_dump(config.model_dump(mode="json")),
        "eval.jsonl": json.dumps({"kind": "after", "run": name}) + "\n",
        "summary.json": json.dumps({"steps": 300}),
        "metrics.jsonl": json.dumps({"step": 1, "reward/composed": 0.5, "operations/learner": 7.0, "kl": 0.1}) + "\n",
    }
    for file, text in texts.items():
        (config.folder / file).write_text(text)
    (config.folder / "checkpoints").mkdir()
    return config.folder


def refuse(said: str) -> None:
    raise AssertionError(said)


def test_runs_come_back_elsewhere_without_their_old_place(tmp_path: Path) -> None:
    folders = [ran(tmp_path / "old", name) for name in ("a", "b")]
    RunFolder(folders[0]).write_start({"operations/experts": 5.0})
    archive = tmp_path / "docs" / "runs.tar.xz"
    assert publish(archive, folders, refuse)
    first = archive.read_bytes()
    assert publish(archive, folders[::-1], refuse) and archive.read_bytes() == first
    wanted = [point(tmp_path / "new", name) for name in ("a", "b", "c")]
    restore(archive, wanted, refuse)
    assert [each.finished for each in wanted] == [True, True, False]
    back = wanted[0].config.folder
    assert [RunFolder(each.config.folder).costs_of_start() for each in wanted[:2]] == [{"operations/experts": 5.0}, {}]
    assert (back / "eval.jsonl").read_text() == (folders[0] / "eval.jsonl").read_text()
    assert json.loads((back / "metrics.jsonl").read_text()) == {
        "step": 1, "reward/composed": 0.5, "operations/learner": 7.0
    }  # fmt: skip
    assert str(tmp_path) not in (back / "config.yaml").read_text()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a", "b"]


def test_an_archive_is_not_replaced_by_fewer_runs(tmp_path: Path) -> None:
    folders = [ran(tmp_path, name) for name in ("a", "b")]
    archive, said = tmp_path / "runs.tar.xz", list[str]()
    publish(archive, folders, refuse)
    assert not publish(archive, folders[1:], said.append)
    assert names(archive) == ["a", "b"] and "--published" in said[0] and "(a is one)" in said[0]


def test_a_run_that_cannot_be_read_leaves_the_archive_whole(tmp_path: Path) -> None:
    folders = [ran(tmp_path, name) for name in ("a", "b")]
    archive = tmp_path / "runs.tar.xz"
    publish(archive, folders, refuse)
    (folders[1] / "eval.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        publish(archive, folders, refuse)
    assert names(archive) == ["a", "b"]


def test_what_is_here_stays_and_what_had_other_settings_is_run_again(tmp_path: Path) -> None:
    archive, said = tmp_path / "runs.tar.xz", list[str]()
    publish(archive, [ran(tmp_path / "old", "a"), ran(tmp_path / "old", "b", "learner.learning_rate=1.0")], refuse)
    (tmp_path / "new" / "a").mkdir(parents=True)
    wanted = [point(tmp_path / "new", name) for name in ("a", "b")]
    restore(archive, wanted, said.append)
    assert not list((tmp_path / "new" / "a").iterdir()) and not wanted[1].config.folder.exists()
    assert said == ["b was published with other settings (learner.learning_rate): it is run again"]
    longer = point(tmp_path / "longer", "b", "steps=600", "learner.learning_rate=1.0")
    restore(archive, [longer], said.append)
    assert said[1:] == ["b was published with other settings (steps): it is run again"]
    longer.check()


def test_runs_of_other_weights_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, built = make(tmp_path / "here", "qwen2"), []
    monkeypatch.setattr(paths, "ensure", built.append)
    monkeypatch.setattr(paths, "resolve", lambda name: here)

    def of(digest: str) -> Run:
        return Run(
            tmp_path, 0, {}, {}, 0, 0.0, frozen={"zoo/composed/policy in float32": digest, "mine in float32": "x"}
        )

    same_models([])
    assert not built
    same_models([of(weights_sha256(load_frozen(str(here)).model))])
    assert built == ["composed"]
    with pytest.raises(ConfigError, match="zoo/composed/policy has other weights here"):
        same_models([of("other")])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_comparison_can_be_planned(section: Section) -> None:
    """Its settings are settings, no two of its runs share a folder, and its pairs are of what it compares."""
    recipe, arms = ROOT / section.recipe, named_arms(ROOT / section.arms)
    assert all(point.config.trains for point in grid(recipe, section.fixed, arms, seeds=1))
    if section.tune:
        assert tuning(recipe, section.fixed, arms, section.tune).keys() == set(arms)
    assert {name for pair in section.pairs for name in pair} <= {arm.name for arm in arms} | {*LABELS.values(), START}


def test_the_notice_stands_at_the_top_of_page_and_readme_and_is_written_with_the_page() -> None:
    for page in (PAGE, ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert text.split("\n\n")[1] + "\n" == NOTICE and text.count(NOTICE) == 1
        assert with_notice(text) == text == with_notice(text.replace(NOTICE, "").replace("\n\n\n", "\n\n"))


def test_what_is_published_is_what_the_plans_say() -> None:
    """Every arm that a plan names stands in the page's data with as many seeds as the plan has."""
    published = json.loads(DATA.read_text())
    assert published.keys() == {section.name for section in SECTIONS}
    for section in SECTIONS:
        seeds = {arm["label"]: len(arm["seeds"]) for arm in published[section.name]["arms"]}
        planned = {arm.name: section.seeds for arm in named_arms(ROOT / section.arms)}
        assert {name: seeds.get(name) for name in planned} == planned
