"""Every Reasoning Gym data set through our own sources and verifiers: the gold answer, a wrong one, none at all."""

from __future__ import annotations

import pickle
import random

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from rewards.config import DataConfig, TaskConfig
from rewards.gym import categories
from rewards.sources import all_entries
from rewards.verify import RewardsError

COUNT = 20
# What takes seconds an entry by default is generated smaller: what is tested is the scoring.
SMALLER: dict[str, dict] = {
    "knight_swap": {"impossible_ratio": 1.0},
    "futoshiki": {"max_board_size": 5, "max_difficulty": 1},
    "intermediate_integration": {"problem_type_weights": [1, 0, 0, 0, 0, 0, 0, 0]},
    "puzzle24": {"max_value": 6},
    "sokoban": {"max_w": 6, "max_h": 6, "max_boxes": 4},
    "zebra_puzzles": {"num_people": 3, "num_characteristics": 3},
}
NEEDS_OTHERS = {"composite"}  # a mixture of other data sets, which our own streams do better
WITHOUT_ONE_GOLD = {
    "boxnet",
    "graph_color",
    "propositional_logic",
    "rubiks_cube",
    "rush_hour",
}  # many answers are right


def test_every_data_set_has_a_category() -> None:
    listed = [name for members in categories().values() for name in members]
    assert sorted([*listed, *NEEDS_OTHERS]) == sorted(DATASETS)
    print(f"{len(DATASETS)} data sets; not run: {', '.join(NEEDS_OTHERS)}")


@pytest.mark.parametrize("name", sorted(set(DATASETS) - NEEDS_OTHERS))
def test_scores_are_the_data_set_s_own(name: str) -> None:
    task = TaskConfig(name="t", dataset=name, size=COUNT, config=SMALLER.get(name, {}))
    entries, verifier = all_entries(task, DataConfig(seed=7, tasks=(task,)))
    verifier = pickle.loads(pickle.dumps(verifier))
    theirs = reasoning_gym.create_dataset(name, seed=7, size=COUNT, **SMALLER.get(name, {}))
    again, _ = all_entries(task, DataConfig(seed=7, tasks=(task,)))
    assert len(entries) == COUNT
    assert [(p.text, p.answer) for p in again] == [(p.text, p.answer) for p in entries]
    rng = random.Random(0)
    for prompt in entries:
        entry = prompt.payload["entry"]
        others = [other.answer for other in entries if other.answer != prompt.answer]
        wrong = rng.choice(others) if others else "certainly not"
        for answer in (prompt.answer, wrong):
            own = float(theirs.score_answer(answer.strip(), entry))
            if False:
                own = float(answer == prompt.answer)
            assert verifier.score(answer, prompt) == pytest.approx(own)
        assert (0.0 <= verifier.score("", prompt) < 0.99) or prompt.answer == ""
        assert 0.0 <= verifier.score("\x00 <answer>\u202e[[[", prompt) < 0.99
        if name not in WITHOUT_ONE_GOLD:
            assert verifier.score(f"so <answer>{prompt.answer}</answer>", prompt) == pytest.approx(1.0)


def test_composite_is_refused_with_the_reason() -> None:
    task = TaskConfig(name="t", dataset="composite")
    with pytest.raises(RewardsError, match=r"composite refuses config .* at least one dataset"):
        all_entries(task, DataConfig(tasks=(task,)))
