"""`musketeers tasks` and `score`: what a user looks at, and tries, before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reasoning_gym

from cluster import cli
from rewards.gym import categories

RECIPE = """
run: r
steps: 1
data: {tasks: [{name: sums, dataset: chain_sum, size: 50, config: {max_terms: 2}},
               {name: pair, compose: [sums, sums], operation: maximum}]}
experts: [{name: e, model: /e}]
policy: {model: /p}
"""


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit status and what was printed."""
    monkeypatch.setattr("sys.argv", ["musketeers", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    try:
        cli.main()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def completions(folder: Path, *rows: object) -> str:
    """A file of completions."""
    path = folder / "answers.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def test_a_category_is_listed_with_an_example_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, _ = run(capsys, monkeypatch, "tasks", "--category", "logic", "--json")
    listed = json.loads(out)
    assert status == 0
    assert [row["name"] for row in listed] == categories()["logic"]
    assert all(row["prompt"] and not row["problem"] for row in listed)
    status, out, _ = run(capsys, monkeypatch, "tasks", "--category", "induction")
    assert status == 0 and "list_functions" in out and "2 tasks" in out
    status, _, err = run(capsys, monkeypatch, "tasks", "--category", "logics")
    assert status == 2 and "arithmetic" in err


def test_prompts_are_shown_as_a_model_reads_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, out, _ = run(capsys, monkeypatch, "tasks", "show", "chain_sum", "--seed", "5", "--count", "2")
    entry = reasoning_gym.create_dataset("chain_sum", seed=5, size=2)[1]
    assert entry["question"] in out and f"answer {entry['answer']}" in out
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    _, out, _ = run(capsys, monkeypatch, "tasks", "show", "pair", "--config", str(tmp_path / "recipe.yaml"))
    assert "What is the largest of the two answers?" in out
    status, _, err = run(capsys, monkeypatch, "tasks", "show", "chain_sums")
    assert status == 2 and "did you mean" in err


def test_a_file_of_completions_is_scored_through_a_worker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dataset = reasoning_gym.create_dataset("chain_sum", seed=5, size=4)
    right = [{"index": i, "completion": f"<answer>{dataset[i]['answer']}</answer>"} for i in (3, 0)]
    source = completions(tmp_path, *right, {"index": 2, "completion": "none"})
    status, out, _ = run(capsys, monkeypatch, "score", "chain_sum", "--seed", "5", "--input", source)
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(line["index"], line["reward"], line["status"]) for line in lines] == [
        (3, 1.0, "ok"), (0, 1.0, "ok"), (2, 0.0, "ok")
    ]  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = ("--config", str(tmp_path / "recipe.yaml"))
    _, out, _ = run(capsys, monkeypatch, "score", "pair", *recipe, "--input", source)
    assert {json.loads(line)["status"] for line in out.splitlines()} == {"ok"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"index": 0}, "line 2: needs index and completion"),
        ({"index": -1, "completion": "1"}, "line 2: index must be a position from 0"),
        ({"index": 0, "completion": 1}, "completion a text"),
        ("x", "line 2: needs index and completion"),
        ({"index": 50, "completion": "1"}, "line 2: sums has no entry 50: it has 50"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row: object, message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    source = completions(tmp_path, {"index": 0, "completion": "1"}, row)
    arguments = ("score", "sums", "--config", str(tmp_path / "recipe.yaml"), "--input", source)
    status, out, err = run(capsys, monkeypatch, *arguments)
    assert status == 2 and message in err and out == ""
