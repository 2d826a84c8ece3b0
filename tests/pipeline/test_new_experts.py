"""What is refused of `router.add_expert` before any model is loaded, with the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError, parse
from cluster.run import preflight
from cluster.zoo import paths
from tests.pipeline.runs import made_up_run, settings

NEW = {"name": "new", "model": "org/new"}
OLD = settings(Path("runs"))["experts"]


def config(init: Path | str | None, experts: list[dict[str, Any]] | None = None, **router: Any) -> Any:
    """A run that adds an expert to a made-up run of two."""
    more = router.pop("more", {})
    router = {"width": 16, "heads": 2, "latents": 3, "init": init and str(init), "add_expert": ["new"], **router}
    return parse(
        settings(Path("runs"), experts=experts or [NEW, *OLD], router=router, **{"tracking": {}, **more}), "test"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"init": None}, r"router: router\.add_expert adds to a trained router: give router\.init too"),
        ({"add_expert": ["nobody"]}, r"router\.add_expert: 'nobody' is none of the experts new, one, two"),
        ({"add_expert": ["new", "new"]}, r"router\.add_expert holds a name twice"),
        ({"add_expert": ["new", "one", "two"]}, r"router\.add_expert names every expert"),
        *(({"kind": kind}, rf"is for kind: perceiver: in a router of kind {kind}") for kind in ("top1", "none", "a:B")),
        ({"warm_start": {"steps": 1}, "text": {"template": "{one}{prompt}"}}, r"set router\.warm_start\.steps to 0"),
        ({"calibration": {"prompts": 0}}, r"give router\.calibration\.prompts"),
        ({"more": {"policy": {"model": "org/policy", "lora": {"rank": 2}}}}, r"and policy\.lora an adapter"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**{"init": "somewhere", **wrong})
    assert config("somewhere").router.add_expert == ("new",), "or it is refused for another reason"


def test_the_others_must_be_the_saved_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_up_run(tmp_path)
    monkeypatch.setattr(paths, "worlds_named_by", lambda names: set())  # the recipe of no world has these models
    preflight.check_names(config(run))
    preflight.check_names(config(run, [OLD[1], NEW, OLD[0]]))
    with pytest.raises(ConfigError, match=r"router\.add_expert: .*trio knows expert 'one' already"):
        preflight.check_names(config(run, OLD, add_expert=["one"]))
    with pytest.raises(ConfigError, match=r"belongs to experts \['one', 'two'\], .* this run has \['one'\]"):
        preflight.check_names(config(run, [NEW, OLD[0]]))
    with pytest.raises(ConfigError, match=r"router\.init: '/nowhere' holds no router\.json"):
        preflight.check_names(config("/nowhere"))
    preflight.check_names(config("hub:me/trio"))  # a plan downloads nothing


def test_widths_are_compared_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_up_run(tmp_path)
    widths = {"org/new": 99, "org/one": 6, "zoo/composed/two": 10, "org/policy": 12}
    monkeypatch.setattr(preflight, "model_path", lambda reference: reference)
    monkeypatch.setattr(
        preflight, "describe", lambda reference: dict.fromkeys(("hidden_size", "embedding_size"), widths[reference])
    )
    for experts in ([NEW, *OLD], [OLD[1], OLD[0], NEW]):
        preflight.check_start(config(run, experts))
    widths["zoo/composed/two"] = 11
    with pytest.raises(ConfigError, match=r"width 10 from expert two, and experts\.0\.model .* is 11 wide"):
        preflight.check_start(config(run, [OLD[1], OLD[0], NEW]))


def test_the_plan_says_what_trains() -> None:
    (learner,) = [row for row in preflight.plan_rows(config("somewhere")) if row.stage == "Learner"]
    assert "router, of which only new trains" in learner.model
