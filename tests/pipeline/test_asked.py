"""Whose states the experts give for a prompt, and votes among their answers."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.config import ConfigError, RunConfig, parse
from cluster.run.asked import asked_by
from cluster.run.routing import vote
from rewards.sources import Task, build_tasks


def configuration(**router: object) -> RunConfig:
    """Two Reasoning Gym tasks, of which one has weight."""
    task = {"dataset": "chain_sum", "size": 200, "config": {"max_terms": 2, "max_digits": 1}}
    return parse(
        {
            "run": "r",
            "steps": 1,
            "data": {"tasks": [{"name": "a", **task}, {"name": "b", **task, "config": {"min_digits": 2}}]},
            "experts": [{"name": "one", "model": "one"}],
            "policy": {"model": "p"},
            "router": router,
        },
        "test",
    )


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """Their prompts."""
    return build_tasks(configuration().data)


def test_prompts_speak_for_themselves_unless_told_otherwise(tasks: dict[str, Task]) -> None:
    prompts = tasks["a"].train[:5]
    assert asked_by(configuration(), tasks).donors(prompts) == prompts


def test_of_a_task_s_prompts_all_are_shown_as_the_same_one(tasks: dict[str, Task]) -> None:
    prompts = [*tasks["a"].test[:5], *tasks["b"].test[:5]]
    donors = asked_by(configuration(states="task"), tasks).donors(prompts)
    assert {d.text for d in donors[:5]} == {tasks["a"].train[0].text}
    assert {d.text for d in donors[5:]} == {tasks["b"].train[0].text}


@pytest.mark.parametrize("states", ["shuffled", "shuffled_within_task"])
def test_shuffled_prompts_get_another_s_states_with_another_answer(tasks: dict[str, Task], states: str) -> None:
    prompts = list(tasks["a"].train[:60])
    donors = asked_by(configuration(states=states), tasks).donors
    found = donors(prompts)
    assert list(found) == list(donors(prompts[::-1]))[::-1], "a prompt's donor does not depend on its company"
    assert all(d.answer != p.answer for d, p in zip(found, prompts, strict=True))
    assert {d.task for d in found} == ({"a"} if states == "shuffled_within_task" else {"a", "b"})
    assert len({d.text for d in found}) > 20


@pytest.mark.parametrize(("kind", "what"), [("perceiver", "states"), ("static", "nothing"), ("text", "answers")])
def test_experts_are_asked_what_the_collaborator_uses(tasks: dict[str, Task], kind: str, what: str) -> None:
    assert asked_by(configuration(kind=kind), tasks).what == what


@pytest.mark.parametrize("router", [{"gate": True}, {"kind": "top1"}])
def test_choices_are_not_starved_of_the_groups_that_tell_them_apart(router: dict[str, object]) -> None:
    values = configuration(**router).model_dump(mode="json")
    with pytest.raises(ConfigError, match="drops the groups that tell a router's choices apart"):
        parse(values | {"algorithm": {"kind": "dapo"}}, "test")


def test_most_votes_win_and_trust_decides_between_equals() -> None:
    answers = [["1", "5", "x "], ["2", "6", "x"], ["2", "7", "y"]]
    assert vote(answers, np.array([0.9, 0.1, 0.5])).tolist() == [2, 0, 0]
    assert vote(answers[:2], np.array([0.1, 0.2])).tolist() == [1, 1, 1]
