"""`musketeers tasks` and `score`: what a user looks at, and tries, before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reasoning_gym

from cluster import cli
from cluster.run import catalogue
from rewards import attack
from rewards.attack import HOSTILE, VERDICTS, Case
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


def test_a_recipe_s_prompts_are_exported_with_the_questions_in_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    status, out, _ = run(capsys, monkeypatch, "tasks", "export", str(recipe), "data.split_by=question")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and {line["task"] for line in lines} == {"sums", "pair"}
    assert all(set(line) == {"task", "split", "ordinal", "text", "answer", "parts"} for line in lines)
    held_out = {part["question"] for line in lines if line["split"] == "test" for part in line["parts"]}
    trained = {part["question"] for line in lines if line["split"] == "train" for part in line["parts"]}
    assert held_out and trained and not held_out & trained
    pair = next(line for line in lines if line["task"] == "pair")
    assert [part["task"] for part in pair["parts"]] == ["sums", "sums"]
    assert int(pair["answer"]) == max(int(part["answer"]) for part in pair["parts"])
    assert all(part["question"] in line["text"] for line in lines for part in line["parts"])
    _, out, _ = run(capsys, monkeypatch, "tasks", "export", str(recipe), "data.split_by=question", "--split", "test")
    assert [json.loads(line) for line in out.splitlines()] == [line for line in lines if line["split"] == "test"]
    status, _, err = run(capsys, monkeypatch, "tasks", "export", str(recipe), "--split", "tests")
    assert status == 2 and "it is one of train, validation, test" in err


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


ATTACKED = """
run: r
steps: 1
data:
  tasks:
    - {name: doubles, plugin: "tests.rewards.verifiers:Doubles", size: 6}
    - {name: found, plugin: "tests.rewards.verifiers:Doubles", size: 6, verifier: "tests.rewards.verifiers:finds_gold"}
    - {name: zero, plugin: "tests.rewards.verifiers:Doubles", size: 6, verifier: "tests.rewards.verifiers:likes_zero"}
    - {name: chokes, plugin: "tests.rewards.verifiers:Doubles", size: 6, verifier: "tests.rewards.verifiers:chokes"}
    - {name: evaluates, plugin: "tests.rewards.verifiers:Doubles", verifier: "tests.rewards.verifiers:evaluates"}
    - {name: absent, plugin: "tests.rewards.verifiers:Doubles", verifier: "tests.rewards.verifiers:nothing"}
experts: [{name: e, model: /e}]
policy: {model: /p}
"""
ESCAPES = ("\x1b", "\x9b", "\u202e", "\ud800", "\x00")


@pytest.fixture
def attacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A recipe, and a battery without the long ones, which take seconds."""
    monkeypatch.setattr(attack, "HOSTILE", tuple(hostile for hostile in HOSTILE if len(hostile) < 2000))
    path = tmp_path / "recipe.yaml"
    path.write_text(ATTACKED)
    return "--config", str(path)


def test_an_attack_that_a_verifier_withstands_is_a_table_and_status_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attacked: tuple[str, str]
) -> None:
    status, out, _ = run(capsys, monkeypatch, "score", "doubles", "--attack", *attacked)
    assert status == 0, out
    assert "wrong answers that scored right: none" in out and "6 prompts" in out
    assert all(verdict in out for verdict in VERDICTS)
    assert "6 x reworded, as for prompt 0: '**0**'" in out
    assert "a policy that always answers '0' earns 0.17" in out


def test_wrong_answers_that_score_right_are_named_with_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attacked: tuple[str, str]
) -> None:
    status, out, _ = run(capsys, monkeypatch, "score", "found", *attacked, "--attack", "--count", "5", "--json")
    found = json.loads(out)
    assert status == 1 and found["entries"] == 5 and not found["executed"]
    rows = {row.pop("kind"): row for row in found["kinds"]}
    assert all(sum(row[verdict] for verdict in VERDICTS) == row["count"] for row in rows.values())
    assert rows["hedge"]["right"] == rows["hedge"]["count"] == 50 and rows["reworded"]["right"] == 100
    hedges = [each for each in found["false_positives"] if each["kind"] == "hedge"]
    assert {"kind", "form", "index", "completion", "characters", "reason"} == set(hedges[0])
    assert "not 2 but 0" in [each["completion"] for each in hedges if each["index"] == 1]
    status, out, _ = run(capsys, monkeypatch, "score", "zero", *attacked, "--attack")
    assert status == 1 and "5 x constant, as for prompt 1: '0'" in out
    assert "a policy that always answers '0' earns 1.00" in out


def test_what_a_completion_or_a_verifier_says_never_reaches_the_terminal_raw(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attacked: tuple[str, str]
) -> None:
    status, out, _ = run(capsys, monkeypatch, "score", "chokes", *attacked, "--attack")
    assert status == 0 and "\\x1b[2J\\x1b]0;right" in out and "[bold red]1[/]" in out
    assert not [each for each in ESCAPES if each in out]
    assert not [line for line in out.splitlines() if line.startswith("{")], "the forged verdict"
    _, out, _ = run(capsys, monkeypatch, "score", "chokes", *attacked, "--attack", "--json")
    assert out.isascii() and not [each for each in ESCAPES if each in out]
    masked = json.loads(out)["masked"]
    assert {"hostile", "reworded"} <= {each["kind"] for each in masked} and all(each["reason"] for each in masked)


def test_a_recipe_s_own_settings_and_overrides_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, attacked: tuple[str, str]
) -> None:
    override = "data.tasks.0.verifier=tests.rewards.verifiers:likes_zero"
    status, _, _ = run(capsys, monkeypatch, "score", "doubles", override, "--attack", *attacked, "--count", "2")
    assert status == 1
    status, out, _ = run(capsys, monkeypatch, "score", "zero", "rewards.binary_at=-1", "--attack", *attacked, "--json")
    assert status == 1 and {row["wrong"] for row in json.loads(out)["kinds"]} == {0}


@pytest.mark.parametrize(("name", "jail"), [("exit", "best_effort"), ("import os", "off")])
def test_a_completion_that_ran_as_code_fails_the_attack(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    attacked: tuple[str, str],
    name: str,
    jail: str,
) -> None:
    monkeypatch.setattr(attack, "HOSTILE", tuple(hostile for hostile in HOSTILE if hostile.name == name))
    arguments = ("score", "evaluates", f"rewards.jail='{jail}'", "--attack", *attacked, "--count", "2")
    status, out, _ = run(capsys, monkeypatch, *arguments)
    assert status == 1 and "this verifier runs what it is given" in out and not attack.CANARY.exists()
    status, out, _ = run(capsys, monkeypatch, *arguments, "--json")
    assert status == 1 and json.loads(out)["executed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("doubles",), "one of --input FILE, --attack and --steps A..B"),
        (("doubles", "--attack", "--steps", "1..2"), "one of --input FILE, --attack and --steps A..B"),
        (("chain_sum", "rewards.binary_at=0.5", "--attack"), "give --config RECIPE too"),
        (("doubles", "--input", "none.jsonl", "--json"), "its lines are JSON"),
        (("absent", "--attack", "--config"), "'tests.rewards.verifiers:nothing' cannot be used"),
        (("triples", "--attack", "--config"), "has no task 'triples'"),
    ],
)
def test_a_command_that_cannot_be_followed_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    attacked: tuple[str, str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    given = arguments if arguments[-1] != "--config" else (*arguments[:-1], *attacked)
    status, out, err = run(capsys, monkeypatch, "score", *given)
    assert status == 2 and message in err and not out and len(err.strip().splitlines()) == 1


def test_completions_made_to_be_late_are_scored_in_small_batches() -> None:
    hostile = [Case("hostile", str(n), 0, "x", False) for n in range(5)]
    others = [Case("echo", "", 0, "x", False) for _ in range(1201)]
    long = [Case("echo", "", 0, "x" * 3_000_000, False) for _ in range(3)]
    batches = list(catalogue._batches([*hostile, *others, *long]))
    assert [case for batch in batches for case in batch] == [*hostile, *others, *long]
    assert max(sum(case.kind == "hostile" for case in batch) for batch in batches) == 2
    assert len(batches) <= 10 and [len(batch) for batch in batches[-2:]] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "graph_color", "game_of_life"])
def test_the_whole_battery_gets_a_status_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    status, out, _ = run(capsys, monkeypatch, "score", name, "--attack", "--json", "--count", "4", "--timeout", "2")
    rows = {row["kind"]: row for row in json.loads(out)["kinds"]}
    assert status in (0, 1) and rows["hostile"]["count"] == len(HOSTILE)
    assert all(sum(row[verdict] for verdict in VERDICTS) == row["count"] for row in rows.values())
