"""The benchmark's command line, its sums and its tables; nothing here measures time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import engines, memory, serve, step, tables
from benchmarks.job import Job
from tests.models import make


def made_up(system: str, *seconds: float) -> dict:
    steps = [{"encode": 0.01, "rest": s - 0.01, "step": s} if system != "trl" else {"step": s} for s in seconds]
    return {"system": system, "steps": steps, "samples_per_step": 100, "memory_mib": {"total": 300.0, "driver": 200.0}}


def test_defaults_are_every_system_within_eight_minutes() -> None:
    given = step.arguments([])
    assert given.systems == ["distributed", "inline", "trl"]
    assert given.seconds + step.GRACE_S < 8 * 60


@pytest.mark.parametrize(
    "line", [["--rounds", "0"], ["--seconds", "10000"], ["--systems", "other"], ["--warmup", "-1"]]
)
def test_arguments_that_make_no_sense_are_refused(line: list[str]) -> None:
    with pytest.raises(SystemExit):
        step.arguments(line)


def test_the_runs_share_the_time_that_is_left() -> None:
    assert step.share(100.0, 190.0, 3) == 130.0
    assert step.share(200.0, 190.0, 2) == 200.0


def test_a_job_survives_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("inline", "some.yaml", ("seed=1",), 2, 3, "somewhere", 4.5)
    monkeypatch.setattr("sys.argv", ["module", job.as_argument()])
    assert Job.from_command_line() == job


def test_the_warm_up_does_not_count(tmp_path) -> None:
    job = Job("inline", "", (), 1, 2, str(tmp_path), 0.0)
    job.finish(8, [{"step": 9.0}, {"step": 1.0}, {"step": 2.0}])
    assert step.json.loads(job.answer.read_text())["steps"] == [{"step": 1.0}, {"step": 2.0}]


def test_figures_are_medians_and_ratios_point_the_right_way() -> None:
    runs = [made_up("distributed", 0.3, 0.5), made_up("inline", 0.2, 0.2), made_up("trl", 1.0), made_up("inline", 0.4)]
    found = tables.figures(runs)
    assert found["systems"]["distributed"]["seconds"]["step"] == pytest.approx(0.4)
    assert found["systems"]["inline"]["seconds"]["step"] == pytest.approx(0.2)
    assert found["systems"]["inline"]["samples_per_second"] == pytest.approx((500 + 250) / 2)
    assert found["ratios"] == pytest.approx({"distributed/inline": 2.0, "distributed/trl": 2.5, "inline/trl": 3.75})


def test_a_system_that_measured_nothing_is_left_out() -> None:
    runs = [made_up("distributed", 0.3), made_up("trl"), made_up("inline")]
    found = tables.figures(runs)
    assert list(found["systems"]) == ["distributed"] and found["ratios"] == {}
    tables.render(found)
    tables.render(tables.figures([]))


def test_the_tables_show_every_figure() -> None:
    found = tables.figures([made_up("distributed", 0.3), made_up("inline", 0.2), made_up("trl", 1.0)])
    screen = Console(file=io.StringIO(), width=100)
    screen.print(tables.render(found))
    shown = screen.file.getvalue()
    for expected in ("300", "200", "1.50", "at most 1.6", "3.33", "at least 2", "driver"):
        assert expected in shown


def test_the_file_is_named_after_day_and_device() -> None:
    name = tables.file_name("2030-01-02", {"cpu": "Maker(R) Model 7 @ 3GHz", "cores": 4})
    assert name == "step-2030-01-02-maker-r-model-7-3ghz-4-cores.json"
    assert tables.device()["cores"] >= 1


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["ray::Expert.encode"], "ray::Expert"),
        (["ray::DashboardAgent"], "Ray services"),
        (["/x/raylet/raylet", "--port=1"], "Ray services"),
        (["python", "-m", "benchmarks.training", "{}"], "driver"),
        (["python", "-c", "from rewards.zygote import main"], "scoring process"),
        (["other"], "name"),
    ],
)
def test_processes_are_named_by_what_they_do(command: list[str], expected: str) -> None:
    assert memory.label(command, "name") == expected


def test_a_whole_step_at_a_tiny_shape_needs_neither_ray_nor_vllm(tmp_path: Path) -> None:
    """What `benchmarks.gpu_step` does on a GPU, small enough for here."""
    code = (
        "import sys; from benchmarks.gpu_step import main; "
        f"status = main(['--shape', 'tiny', '--device', 'cpu', '--results', {str(tmp_path)!r}]); "
        "assert not {'ray', 'vllm'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.glob("gpu-step-tiny-*.json")
    found = json.loads(written.read_text())
    assert set(found["seconds"]) == {"encode", "rollout", "learner", "step"}
    assert all(share["of_matrix_rate"] > 0 for share in found["shares"].values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_engines_are_compared_on_a_small_model(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "qwen2", width=128)
    size = ["--prompts", "2", "--prompt-tokens", "8", "--samples", "2", "--new-tokens", "4"]
    assert engines.main(["--model", str(model), "--results", str(tmp_path / "results"), *size]) == 0
    (written,) = (tmp_path / "results").glob("engines-*.json")
    found = json.loads(written.read_text())["models"]["model"]
    assert found["vllm"]["tokens_per_second"] > 0 and found["transformers"]["start_s"] > 0


def test_a_servers_table_shows_every_phase_beside_the_bare_policy() -> None:
    phase = {"requests_per_second": 20.0, "masked": 0, "failed": {}, "latency_s": {"p50": 0.1, "p90": 0.2, "p99": 0.3}}
    found = {"bare": phase, "cold": phase | {"requests_per_second": 15.0, "masked": 3, "failed": {"503: gone": 2}}}
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(serve.render(found))
    text = console.export_text()
    assert "0.75" in text and "300 ms" in text and "every prompt is new" in text and "cached" not in text
    (row,) = [line for line in text.splitlines() if "15.0" in line]
    assert row.split("│")[-3].strip() == "3" and row.split("│")[-2].strip() == "2"
