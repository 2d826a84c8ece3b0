from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.watch.logs import JsonLines, cut_back, read


def test_records_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    log = JsonLines(path, fsync=True)
    log.append({"step": 1, "ordinals": [0, 1], "reward/mean": 0.5, "text": "Füße\n"})
    log.append({"step": np.int64(2), "reward/mean": np.float32(0.25), "eval": {"done": True, "best": None}})
    assert read(path) == [
        {"step": 1, "ordinals": [0, 1], "reward/mean": 0.5, "text": "Füße\n"},
        {"step": 2, "reward/mean": 0.25, "eval": {"done": True, "best": None}},
    ]
    assert '{"step": 2, ' in path.read_text(), "numpy's integers stay integers"


def test_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == []
    assert cut_back(tmp_path / "none.jsonl", 3) == 0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("nan")])
def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path: Path, number: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match=r"router\.norms\[1\] is (nan|inf)"):
        JsonLines(path).append({"step": 1, "router": {"norms": [1.0, number]}})
    assert read(path) == []


def test_a_value_without_a_json_form_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="attention is a ndarray"):
        JsonLines(tmp_path / "metrics.jsonl").append({"attention": np.zeros(2)})


def test_reading_survives_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1}\n{"step": 2, "text": "Füße"}\n'.encode()
    for end in range(len('{"step": 1}\n'), len(whole) - 1):
        path.write_bytes(whole[:end])
        complete = [{"step": 1}] if end < len(whole) - 1 else [{"step": 1}, {"step": 2, "text": "Füße"}]
        assert read(path) == complete


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read(path) == [{"step": 1}, {"step": 2}]
    JsonLines(path).append({"step": 3})
    assert read(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_the_next_writer_does_not_continue_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew')
    JsonLines(path).append({"step": 3})
    assert read(path) == [{"step": 1}, {"step": 3}]


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(path)


def test_cut_back_keeps_the_lines_up_to_a_step_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,  "a": 0.10}\n{"step": 2}\n{"step": 3}\n{"step": 4, "to')
    assert cut_back(path, 2) == 1
    assert path.read_text() == '{"step":1,  "a": 0.10}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path], "no temporary file stays behind"


def test_cut_back_takes_a_predicate(tmp_path: Path) -> None:
    path = tmp_path / "dead_letters.jsonl"
    path.write_text('{"ordinal": 5}\n{"ordinal": 9}\n{"ordinal": 7}\n')
    assert cut_back(path, lambda letter: letter["ordinal"] in {5, 7}) == 1
    assert read(path) == [{"ordinal": 5}, {"ordinal": 7}]


def test_cut_back_to_a_step_needs_steps(tmp_path: Path) -> None:
    path = tmp_path / "dead_letters.jsonl"
    path.write_text('{"ordinal": 5}\n')
    with pytest.raises(ValueError, match="without a step"):
        cut_back(path, 2)
    assert read(path) == [{"ordinal": 5}]


def test_an_open_log_goes_on_after_a_cut(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step})
    cut_back(log.path, 1)
    log.append({"step": 2, "again": True})
    assert read(log.path) == [{"step": 1}, {"step": 2, "again": True}]
