"""Tasks from every kind of source, and what is said when one is wrong."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rewards.config import DataConfig
from rewards.forms import number_words
from rewards.sources import Task, build_tasks, of_length
from rewards.verify import RewardsError
from tests.rewards.conftest import BOTH, LEGS, SUMS, data_of

WORDS = str(Path(__file__).parents[1] / "data" / "word_problems.jsonl")
PLUGIN = "tests.rewards.verifiers:Doubles"


def test_tasks_come_in_the_order_of_the_configuration(tasks: dict[str, Task]) -> None:
    assert list(tasks) == ["both", "sums", "legs"]
    assert all(prompt.task == name for name, task in tasks.items() for prompt in (*task.train[:5], *task.test[:5]))


def test_the_same_configuration_gives_the_same_pools_and_another_seed_does_not(
    data: DataConfig, tasks: dict[str, Task]
) -> None:
    again = build_tasks(data)
    assert {name: (t.train, t.validation, t.test) for name, t in again.items()} == {
        name: (t.train, t.validation, t.test) for name, t in tasks.items()
    }
    assert build_tasks(data_of(BOTH, SUMS, LEGS, seed=2))["both"].train != tasks["both"].train


def test_training_answers_are_in_range_and_nearly_balanced(tasks: dict[str, Task]) -> None:
    task = tasks["sums"]
    answers = Counter(int(prompt.answer) for prompt in task.train)
    assert set(answers) == set(range(13))
    assert max(answers.values()) < 1.5 * min(answers.values())
    assert task.counts["train"] == len(task.train) > task.counts["train_distinct"]


def test_gym_verifiers_accept_the_gold_answer_only_and_read_answer_tags(tasks: dict[str, Task]) -> None:
    prompt = tasks["sums"].test[0]
    verifier = pickle.loads(pickle.dumps(tasks["sums"].verifier))
    assert verifier.score(f" {prompt.answer}\n", prompt) == 1.0
    assert verifier.score(f"I think <answer> {prompt.answer} </answer>", prompt) == 1.0
    assert verifier.score(str(int(prompt.answer) + 1), prompt) < 0.99
    assert verifier.score("", prompt) == 0.0
    assert "_scorer" not in vars(pickle.loads(pickle.dumps(verifier)))  # the data set is built anew where it scores


def test_enum_settings_are_given_by_name() -> None:
    aiw = {"name": "alice", "dataset": "aiw", "size": 300}
    config = {"task_types": ["siblings", "FRIENDS"], "task_type_weights": [0.5, 0.5]}
    task = build_tasks(data_of(aiw | {"config": config}))["alice"]
    assert not any("colleagues" in prompt.text for prompt in task.train)
    with pytest.raises(RewardsError, match="needs task_type_weights, one for each of task_types"):
        build_tasks(data_of(aiw | {"config": {"task_types": ["siblings", "friends"]}}))
    with pytest.raises(RewardsError, match="no 'sibling'; did you mean siblings"):
        build_tasks(data_of(aiw | {"config": config | {"task_types": ["sibling", "friends"]}}))


def test_composed_prompts_show_both_questions_and_combine_both_answers(tasks: dict[str, Task]) -> None:
    task = tasks["both"]
    for prompt in (*task.train[:200], *task.test):
        first, second = prompt.payload["parts"]
        assert (first["task"], second["task"]) == ("sums", "legs")
        assert prompt.text == (
            f"Problem 1: {first['question']}\nProblem 2: {second['question']}\n"
            "What is the sum of the two answers?\nAnswer:"
        )
        expression = re.search(r"problem: (.*) =", first["question"])
        assert expression and eval(expression.group(1)) + int(second["answer"]) == int(prompt.answer)
    gold = task.test[0].answer
    assert task.verifier.score(f" {gold} \n", task.test[0]) == 1.0
    for wrong in ("", f"{gold}.", f"{gold} {gold}", f"1{gold}", "answer"):
        assert task.verifier.score(wrong, task.test[0]) == 0.0


def test_composed_parts_keep_the_balance_of_their_own_tasks(tasks: dict[str, Task]) -> None:
    first = Counter(prompt.payload["parts"][0]["answer"] for prompt in tasks["both"].train)
    assert set(first) == {str(n) for n in range(13)}
    assert max(first.values()) < 1.5 * min(first.values())


@pytest.mark.parametrize(
    ("operation", "compose", "words", "combined"),
    [
        ("difference", ["sums", "legs"], "the first answer minus the second?", lambda a, b: a - b),
        ("maximum", ["sums", "legs"], "the largest of the two answers?", max),
        ("sum", ["sums", "legs", "sums"], "the sum of the three answers?", lambda a, b, c: a + b + c),
        ("difference", ["sums", "legs", "sums"], "minus the sum of the other two?", lambda a, b, c: a - b - c),
    ],
)
def test_every_operation_says_what_it_combines(operation: str, compose: list[str], words: str, combined: Any) -> None:
    both = {"name": "both", "compose": compose, "operation": operation, "size": 100}
    for prompt in build_tasks(data_of(both, SUMS | {"size": 300}, LEGS | {"size": 300}))["both"].train:
        assert words in prompt.text
        assert int(prompt.answer) == combined(*(int(part["answer"]) for part in prompt.payload["parts"]))


@pytest.mark.parametrize(
    ("operation", "compose", "asked", "combined"),
    [
        ("words", ["sums"], "Write the answer in English words.", lambda a: NUMBER_WORDS[a]),
        ("roman", ["sums"], "Write the answer as a Roman numeral.", lambda a: ROMAN[a]),
        ("parity", ["sums"], "Is the answer odd or even?", lambda a: ["even", "odd"][a % 2]),
        (
            "sentence",
            ["legs"],
            'begins with "The answer is" and ends with a full stop.',
            lambda a: f"The answer is {a}.",
        ),
        ("larger", ["sums", "legs"], "first, second or equal.", lambda a, b: LARGER[(a > b) - (a < b)]),
    ],
)
def test_an_answer_in_another_form_needs_what_the_policy_knows(
    operation: str, compose: list[str], asked: str, combined: Any
) -> None:
    form = {"name": "form", "compose": compose, "operation": operation, "size": 100}
    task = build_tasks(data_of(form, SUMS | {"size": 300}, LEGS | {"size": 300}))["form"]
    for prompt in (*task.train, *task.test):
        parts = prompt.payload["parts"]
        assert all(part["question"] in prompt.text for part in parts)
        assert prompt.text.endswith(f"{asked}\nAnswer:") and ("Problem 1: " in prompt.text) == (len(parts) == 2)
        assert prompt.answer == combined(*(int(part["answer"]) for part in parts))
        assert task.verifier.score(f" {prompt.answer}\n", prompt) == 1.0
        others = {other.answer for other in task.train} - {prompt.answer}
        assert len(others) > 0 and not any(task.verifier.score(other, prompt) for other in others)


NUMBER_WORDS = [number_words(value) for value in range(13)]
ROMAN = ["", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"]
LARGER = ["equal", "first", "second"]


def test_answers_that_an_operation_cannot_write_are_left_out_or_refused() -> None:
    roman = {"name": "roman", "compose": ["sums"], "operation": "roman"}
    with pytest.raises(RewardsError, match="'roman': operation roman can write none of the answers of its part 'sums'"):
        build_tasks(data_of(roman, SUMS | {"answers": {"min": 0, "max": 0}}))


def test_a_task_s_own_template_can_have_examples_in_front_and_the_parts_questions() -> None:
    words = {"name": "words", "compose": ["sums"], "operation": "words", "size": 100}
    own = "Word: what is 2 + 1? three\n\nWord: {part1}"
    pair = {"name": "pair", "compose": ["legs", "sums"], "operation": "larger", "size": 50}
    settings = [
        words | {"template": own},
        pair | {"template": "{part2} or {part1}:"},
        SUMS | {"template": "<{question}>"},
    ]
    found = build_tasks(data_of(*settings, LEGS))
    for prompt in found["words"].train:
        (part,) = prompt.payload["parts"]
        assert (
            prompt.text == own.replace("{part1}", part["question"]) and prompt.payload["question"] == part["question"]
        )
        assert found["words"].verifier.score(f"{prompt.answer}\n\nWord: what is 1 + 1? two", prompt) == 1.0
    first, second = found["pair"].train[0].payload["parts"]
    assert found["pair"].train[0].text == f"{second['question']} or {first['question']}:"
    assert found["sums"].train[0].text == f"<{found['sums'].train[0].payload['question']}>"
    assert found["legs"].train[0].text.endswith("\nAnswer:")


def test_a_local_file_gives_prompts_with_bare_gold_answers(tmp_path: Path) -> None:
    task = build_tasks(data_of({"name": "words", "path": WORDS}, validation=0.01, test=0.01))["words"]
    prompts = {prompt.text: prompt for prompt in (*task.train, *task.validation, *task.test)}
    assert len(prompts) == 8
    assert {"36", "1000", "-3", "2/3", "2.5"} <= {prompt.answer for prompt in prompts.values()}
    assert all(task.verifier.score(p.payload["solution"], p) == 1.0 for p in prompts.values())
    assert len(build_tasks(data_of({"name": "words", "path": WORDS, "size": 3}))["words"].train) <= 3


def test_a_parquet_file_reads_the_same(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [json.loads(line) for line in Path(WORDS).read_text().splitlines()]
    Dataset.from_list(rows).to_parquet(tmp_path / "words.parquet")
    json_pools = build_tasks(data_of({"name": "words", "path": WORDS}))["words"]
    parquet_pools = build_tasks(data_of({"name": "words", "path": str(tmp_path / "words.parquet")}))["words"]
    assert json_pools.train == parquet_pools.train


def test_a_plugin_brings_entries_and_scores(tasks: dict[str, Task]) -> None:
    task = build_tasks(data_of({"name": "doubles", "plugin": PLUGIN, "size": 200}))["doubles"]
    assert task.counts["train"] + task.counts["validation"] + task.counts["test"] == 200
    assert all(prompt.task == "doubles" for prompt in task.train)
    assert task.verifier.score(task.train[0].answer, task.train[0]) == 1.0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"dataset": "chain_sums"}, "task 't': Reasoning Gym has no data set 'chain_sums'; did you mean .*chain_sum"),
        (
            {"dataset": "chain_sum", "config": {"min_term": 2}},
            "chain_sum has no setting 'min_term'; did you mean min_terms",
        ),
        ({"dataset": "chain_sum", "config": {"seed": 2}}, "set data.seed and the task's size instead of config.seed"),
        ({"dataset": "chain_sum", "config": {"min_terms": 9, "max_terms": 3}}, "chain_sum refuses config .*max_terms"),
        ({"path": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        (
            {"path": "some/dataset"},
            "path 'some/dataset' ends in none of .jsonl, .* goes into hub",
        ),
        ({"plugin": "Doubles"}, "plugin 'Doubles' must read module:Class"),
        ({"plugin": "tests.nothing:Doubles"}, "no module 'tests.nothing'"),
        ({"plugin": "tests.rewards.verifiers:Double"}, "module 'tests.rewards.verifiers' has no class 'Double'"),
        ({"plugin": "tests.rewards.verifiers:WithoutEntries"}, "has no method entries"),
        ({"plugin": "tests.rewards.verifiers:Unpicklable"}, "cannot be pickled"),
        (
            {"plugin": PLUGIN, "answers": {"min": 1000, "max": 1001}, "size": 50},
            "no training prompts are left of 50 entries .0 in the range",
        ),
    ],
)
def test_a_wrong_task_is_refused_with_one_line_that_says_what_to_do(task: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardsError, match=message) as caught:
        build_tasks(data_of({"name": "t", **task}))
    assert "\n" not in str(caught.value)
    assert "'t'" in str(caught.value)


def test_rows_that_are_no_word_problems_are_refused(tmp_path: Path) -> None:
    for row, message in (
        ({"question": "How many?"}, "row 0 of .* has no text in column 'answer'"),
        ({"question": "How many?", "answer": "#### many"}, "answer 'many' is no number"),
    ):
        path = tmp_path / f"{len(row)}.jsonl"
        path.write_text(json.dumps(row))
        with pytest.raises(RewardsError, match=message):
            build_tasks(data_of({"name": "t", "path": str(path)}))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": ')
    with pytest.raises(RewardsError, match="cannot read"):
        build_tasks(data_of({"name": "t", "path": str(broken)}))


def test_compositions_need_plain_parts_with_integer_answers() -> None:
    doubles = {"name": "doubles", "plugin": PLUGIN, "size": 50}
    pair = {"name": "pair", "compose": ["doubles", "doubles"]}
    with pytest.raises(RewardsError, match="its part 'pair' is composed itself"):
        build_tasks(data_of(doubles, pair, {"name": "more", "compose": ["doubles", "pair"]}))
    with pytest.raises(RewardsError, match="part 'doubles' has no entries with an integer answer"):
        build_tasks(data_of(doubles | {"answers": {"min": 1000, "max": 1001}}, pair))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"compose": ["t2"]}, "compose takes 2 or 3 tasks, got 1"),
        ({"compose": ["t2"]}, "operation: sum.; for 1 set operation to words, roman, parity, sentence"),
        ({"compose": ["t2", "t2"], "operation": "words"}, "compose takes 1 tasks, got 2 .* set operation to sum, diff"),
        ({"compose": ["t2"], "operation": "larger"}, "compose takes 2 tasks, got 1 .operation: larger.; for 1 set"),
        ({"compose": ["t2"] * 4, "operation": "larger"}, "compose takes 2 tasks, got 4 .operation: larger. .type"),
        (
            {"compose": ["t2"], "operation": "words", "verifier": "number"},
            "number reads no .* words: leave verifier out",
        ),
        ({"compose": ["t2"], "operation": "words", "template": "Say"}, "template must contain {question} or {part1}"),
        ({"compose": ["t2", "t2"], "template": "{part1}"}, "must contain {question} or {part1}, {part2}"),
        ({"compose": ["t2", "t2"], "template": "{question}{part3}"}, "template has {part3}, but compose names 2 tasks"),
        ({"dataset": "chain_sum", "template": "{part1}"}, "template must contain {question} .type"),
        ({"dataset": "chain_sum", "template": "{question}{part1}"}, "template has {part1}, but compose names no tasks"),
        ({"dataset": "chain_sum", "operation": "words"}, "operation is for compose; dataset takes none"),
        ({"plugin": PLUGIN, "template": "{question}"}, "template is for dataset or .*; plugin takes none"),
        ({"path": "x.jsonl", "config": {"min_terms": 1}}, "config is for dataset; path takes none"),
        ({"dataset": "a", "answers": {"min": 3, "max": 1}}, "answers.min is 3, above answers.max, 1"),
    ],
)
def test_the_configuration_refuses_what_can_be_seen_without_data(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data_of({"name": "t", **task}, {"name": "t2", "plugin": PLUGIN})


def test_a_category_is_one_task_a_data_set() -> None:
    kept = ["acre", "list_functions"]
    found = build_tasks(data_of({"name": "thinking", "category": "induction", "size": 30, "weight": 3.0}))
    assert list(found) == [f"thinking.{name}" for name in kept]
    assert [task.config.weight for task in found.values()] == [1.5, 1.5]
    less = {"name": "thinking", "category": "induction", "size": 30, "exclude": ["acre"]}
    assert list(build_tasks(data_of(less))) == ["thinking.list_functions"]
    for change, message in (
        ({"category": "inductive"}, "no category 'inductive'; did you mean induction"),
        ({"category": "induction", "exclude": ["acer"]}, "induction has no data set 'acer'"),
        ({"category": "induction", "exclude": kept}, "exclude leaves nothing of induction"),
    ):
        with pytest.raises(RewardsError, match=message):
            build_tasks(data_of({"name": "t", **change}))


def test_a_category_cannot_be_composed_nor_hide_another_task() -> None:
    thinking = {"name": "thinking", "category": "induction", "size": 30}
    sums = {"name": "sums", "dataset": "chain_sum", "size": 30}
    with pytest.raises(RewardsError, match="'pair' composes 'thinking', a category"):
        build_tasks(data_of(thinking, sums, {"name": "pair", "compose": ["thinking", "sums"]}))
    with pytest.raises(RewardsError, match=r"'thinking.acre' is named twice"):
        build_tasks(data_of(thinking, sums | {"name": "thinking.acre"}))


def test_another_system_prompt_moves_no_prompt_into_another_split() -> None:
    task = {"name": "sums", "dataset": "chain_sum", "size": 200}
    plain, other = (build_tasks(data_of(task, system=name))["sums"] for name in (None, "simple"))
    assert {p.payload["question"] for p in plain.test} == {p.payload["question"] for p in other.test}


def test_a_level_of_the_curriculum_sets_what_the_configuration_leaves_open() -> None:
    def longest(**settings: Any) -> int:
        task = build_tasks(data_of({"name": "t", "dataset": "chain_sum", "size": 200, **settings}))["t"]
        return max(prompt.text.count("+") + prompt.text.count(" - ") for prompt in task.train)

    assert longest(level=0) < longest(level=3)
    assert longest(level=3, config={"min_terms": 2, "max_terms": 2}) == 1
    with pytest.raises(RewardsError, match=r"the curriculum of chain_sum ends at level \d+, level is 99"):
        longest(level=99)
    with pytest.raises(RewardsError, match="acre has no curriculum"):
        build_tasks(data_of({"name": "t", "dataset": "acre", "level": 1}))


def test_columns_and_verifier_of_a_file_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"Expand (x+{n})^2", "solution": f"x^2+{2 * n}x+{n * n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "problem", "answer": "solution", "marker": None}
    found = build_tasks(data_of({"name": "t", "path": str(path), "columns": columns, "verifier": "math"}))["t"]
    prompt = next(p for p in found.train if "(x+3)" in p.text)
    assert found.verifier.score(r"\boxed{9 + 6x + x^2}", prompt) == 1.0
    assert found.verifier.score(r"\boxed{9 + 5x + x^2}", prompt) == 0.0
    with pytest.raises(RewardsError, match="has no text in column 'question', only in problem, solution"):
        build_tasks(data_of({"name": "t", "path": str(path)}))
    with pytest.raises(RewardsError, match="is no number; set verifier to math, text or your own"):
        build_tasks(data_of({"name": "t", "path": str(path), "columns": columns}))


def test_a_hub_data_set_keeps_its_own_held_out_splits(tmp_path: Path) -> None:
    """A folder of files is a data set like one of the hub."""
    for split, start, count in (("train", 0, 80), ("test", 80, 30)):
        rows = [{"question": f"How much is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(start, start + count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build_tasks(data_of({"name": "t", "hub": str(tmp_path)}))["t"]
    assert {prompt.text for prompt in found.test} == {f"How much is {n} + 1?\nAnswer:" for n in range(80, 110)}
    assert len(found.train) + len(found.validation) == 80 and found.validation


def test_a_system_prompt_stands_in_front(tmp_path: Path) -> None:
    task = {"name": "doubles", "dataset": "chain_sum", "size": 60}
    (tmp_path / "mine.txt").write_text("Be brief.\n")
    for name, start in (("default", "Given a problem"), (str(tmp_path / "mine.txt"), "Be brief.")):
        messages = build_tasks(data_of(task, system=name))["doubles"].train[0].messages
        assert [message["role"] for message in messages] == ["system", "user"]
        assert messages[0]["content"].startswith(start)
    with pytest.raises(RewardsError, match=r"'defualt' is none of .*simple"):
        build_tasks(data_of(task, system="defualt"))


def test_prompts_that_are_too_long_are_left_out_or_refused() -> None:
    data = data_of({"name": "sums", "dataset": "chain_sum", "size": 300})
    tasks = build_tasks(data)
    limit = sorted(len(prompt.text) for prompt in tasks["sums"].train)[100]
    data = data.model_copy(update={"max_prompt_tokens": limit})
    short, lost = of_length(tasks, data, lambda prompt: len(prompt.text))
    assert lost["sums"] > 0
    for split in ("train", "validation", "test"):
        pool = getattr(short["sums"], split)
        assert all(len(prompt.text) <= limit for prompt in pool)
        assert [prompt.ordinal for prompt in pool] == list(range(len(pool)))
    with pytest.raises(RewardsError, match=r"prompts are longer than data\.max_prompt_tokens"):
        of_length(tasks, data.model_copy(update={"long_prompts": "refuse"}), lambda prompt: len(prompt.text))
    with pytest.raises(RewardsError, match="all prompts are longer"):
        of_length(tasks, data, lambda prompt: limit + 1)
