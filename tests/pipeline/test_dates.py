"""A chat template that prints the date prints the run's, on whatever day its prompts are read again."""

from __future__ import annotations

import datetime
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cluster.config import ConfigError, RunConfig, changed, load, parse
from cluster.keys import changed_keys
from cluster.run import bundle, finished, rescore, training
from cluster.run.baselines import fingerprints
from cluster.run.folder import RunFolder, RunFolderError
from cluster.run.session import Outcome
from cluster.run.start import expert_recipes, rollout_recipes
from cluster.run.trained import open_trained
from tests.models import make
from tests.pipeline.runs import made_up_run, settings

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
MADE, LATER = datetime.date(2001, 2, 3), datetime.date(2001, 2, 4)
PRINTS = "{{ strftime_now('%d %B') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("override", ["data.date=2001-02-03", "data.date='2001-02-03'"])
def test_a_date_is_one_however_it_is_written(override: str, tmp_path: Path) -> None:
    config = load(RECIPE, [override])
    assert config.data.date == MADE
    (tmp_path / "again.yaml").write_text(config.as_yaml())
    assert load(tmp_path / "again.yaml") == config == changed(config, []) == parse(yaml.safe_load(config.as_yaml()), "")
    assert load(RECIPE, ["policy.chat_template_kwargs={date_string: 2001-02-03}"]).policy.chat_template_kwargs == {
        "date_string": "2001-02-03"
    }
    with pytest.raises(ConfigError, match=r"data\.date"):
        load(RECIPE, ["data.date=yesterday"])


class Days:
    """Stands for the module `datetime`, on a day."""

    def __init__(self, day: datetime.date) -> None:
        self.date = self
        self.today = lambda: day


def train(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, day: datetime.date, resume: bool) -> RunConfig:
    """Starts a run on some day; what would be run."""
    seen: list[RunConfig] = []

    class Session:
        """Instead of workers."""

        def __init__(self, config: RunConfig, *_: Any) -> None:
            seen.append(config)

        async def run(self) -> Outcome:
            return Outcome(0, False)

    monkeypatch.setattr(training, "Session", Session)
    monkeypatch.setattr(training, "datetime", Days(day))
    console = Console(file=io.StringIO())
    training.train(parse(values, "test"), resume=resume, overwrite=False, console=console)
    monkeypatch.setattr(training, "said", console.file.getvalue(), raising=False)  # type: ignore[attr-defined]
    return seen[0]


def test_a_run_keeps_the_day_it_was_made_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path / "model", "llama", width=24)
    (model / "chat_template.jinja").write_text(PRINTS)
    experts = [{"name": "one", "model": str(model)}]
    values = settings(tmp_path, experts=experts, policy={"model": str(model)}, tracking={})
    folder = RunFolder(tmp_path / "trio")
    assert train(values, monkeypatch, MADE, resume=False).data.date == MADE
    assert folder.saved_config().data.date == MADE
    assert train(values, monkeypatch, LATER, resume=True).data.date == MADE == folder.saved_config().data.date
    other = values | {"data": values["data"] | {"date": "2001-02-04"}}
    with pytest.raises(RunFolderError, match=r"cannot be resumed with changed data\.date"):
        train(other, monkeypatch, LATER, resume=True)
    # One of a version that kept none goes on without, and says what that means.
    before = yaml.safe_load(folder.config.read_text())
    del before["data"]["date"]
    folder.config.write_text(yaml.safe_dump(before))
    assert train(values, monkeypatch, LATER, resume=True).data.date is None
    said = training.said.replace("\n", " ")  # type: ignore[attr-defined]
    assert "policy.model: its chat template prints the date" in said and "it reads today's" in said


def test_whatever_reads_a_run_later_reads_its_date(tmp_path: Path) -> None:
    data = {
        "date": "2001-02-03",
        "template": "Q: {question}",
        "tasks": [{"name": "digits", "plugin": "tests.plugins:Digits"}],
    }
    experts = [{"name": "one", "model": "org/one"}, {"name": "two", "model": "org/two"}]
    run = made_up_run(tmp_path / "runs", data=data, experts=experts)
    for place in (run, bundle.export(run, tmp_path / "bundle")):
        config = open_trained(place).config
        ((expert,), *_), (policy,) = expert_recipes(config), rollout_recipes(config)
        assert (expert.args[-1].date, expert.args[-1].template, policy.args[-1]) == (MADE, "Q: {question}", MADE)


def test_runs_of_other_days_are_of_the_same_settings(tmp_path: Path) -> None:
    saved, now = (load(RECIPE, [f"data.date={date}"]) for date in ("2001-02-03", "null"))
    assert changed_keys(saved, now) == [] and changed_keys(now, saved) == ["data.date"]
    rescore._check_tasks(saved.data, now.dated(saved.data.date).data)
    assert "data.date" in finished.BESIDE_THE_POINT
    assert saved.dated(LATER) is saved and now.dated(LATER).data.date == LATER


def test_baselines_are_measured_again_where_a_model_prints_the_date() -> None:
    one, other = ({"fingerprint": "print", "date": date} for date in ("2001-02-03", "2001-02-04"))
    silent = {"fingerprint": "print", "date": ""}
    assert fingerprints([one], silent) != fingerprints([other], silent)
    assert fingerprints([silent], silent) == ["print", "print"]
