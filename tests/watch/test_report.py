from __future__ import annotations

import base64
import re
import struct
from html import unescape
from pathlib import Path

import pytest

from cluster.watch.figure import names, training_figure
from cluster.watch.report import write_report
from cluster.watch.results import verdict
from tests.watch.made_up import evaluation, record, result


def size(png: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize("missing", ["", "attention/", "reward/"])
def test_the_figure_is_wide_whatever_was_measured(tmp_path: Path, missing: str) -> None:
    metrics = [
        {name: value for name, value in record(step).items() if not missing or not name.startswith(missing)}
        for step in range(1, 20)
    ]
    training_figure(metrics, evaluation(result(0.575, 0.907)), tmp_path / "training.png")
    assert size((tmp_path / "training.png").read_bytes()) == (2400, 750)


def test_names_come_from_all_records() -> None:
    metrics = [{"reward/mean": 0.1, "reward/b": 0.1}, {"reward/a": 0.2, "reward/b": 0.1}]
    assert names(metrics, "reward/", exclude=("mean",)) == ["b", "a"]


def test_the_report_carries_everything_it_shows(tmp_path: Path) -> None:
    systems = evaluation(result(0.575, 0.907))
    picture = b"\x89PNG\r\n\x1a\n made up"
    (tmp_path / "training.png").write_bytes(picture)
    write_report(
        tmp_path / "report.html",
        name="tiny <composed>",
        evaluation=systems,
        before={"router": result(0.07, 0.11)},
        attention={"composed": {"chain_sum": 0.47, "leg_counting": 0.53}},
        figure=tmp_path / "training.png",
        configuration="seed: 7\nname: <tiny>\n",
        versions={"python": "3.11.9"},
        command="musketeers train configs/tiny.yaml seed=7",
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert embedded and base64.b64decode(embedded[1]) == picture
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert "<composed>" not in page and "name: <tiny>" not in page, "text is escaped"
    words = " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())
    for expected in (
        "n-Musketeers · tiny <composed>",
        verdict(systems).text,
        verdict(systems).hindsight,
        "router 57.5 53–62 90.7 87–93 74.1 71–77",
        "router before training 7.0",
        "composed 0.47 0.53",
        "musketeers train configs/tiny.yaml seed=7",
        "python 3.11.9",
        "seed: 7 name: <tiny>",
    ):
        assert expected in words, expected
