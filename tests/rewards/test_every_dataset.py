"""Every Reasoning Gym data set through our sources and verifiers: right answers in many spellings, and wrong ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from rewards.config import DataConfig, TaskConfig
from rewards.gym import categories
from rewards.gym_scorers import COMPARISONS, FORMS, SCORERS
from rewards.sources import all_entries
from rewards.verify import RewardsError, SelfTesting
from tests.rewards.gym_samples import (
    ALSO_RIGHT,
    NAMES,
    NEEDS_OTHERS,
    NOT_SPELLED,
    SMALLER,
    SPELLINGS,
    WITHOUT_GOLD,
    WRONG,
    render,
    right_answer,
    samples,
    verdict,
)

COUNT = 20
FEW = 3
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "tasks.md"


def test_every_data_set_has_a_category() -> None:
    listed = [name for members in categories().values() for name in members]
    assert sorted([*listed, *NEEDS_OTHERS]) == sorted(DATASETS)
    assert {*COMPARISONS, *FORMS, *SCORERS, *ALSO_RIGHT, *NOT_SPELLED} <= set(NAMES)
    print(f"{len(DATASETS)} data sets; not run: {', '.join(NEEDS_OTHERS)}")


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_data_set_s_own(name: str) -> None:
    entries, verifier = samples(name, FEW)
    verifier = pickle.loads(pickle.dumps(verifier))
    assert isinstance(verifier, SelfTesting)
    theirs = reasoning_gym.create_dataset(name, seed=7, size=FEW, **SMALLER.get(name, {}))
    again, _ = samples.__wrapped__(name, FEW)
    assert [(p.text, p.answer) for p in again] == [(p.text, p.answer) for p in entries]
    for prompt, following in zip(entries, [*entries[1:], entries[0]], strict=True):
        entry = prompt.payload["entry"]
        wrong = following.answer if following.answer != prompt.answer else "certainly not"
        ours = {answer: verifier.score(answer, prompt) for answer in (prompt.answer, wrong)}
        assert name in WITHOUT_GOLD or ours[prompt.answer] == 1.0
        if name not in {*COMPARISONS, *FORMS, *SCORERS}:
            assert ours == {answer: pytest.approx(theirs.score_answer(answer.strip(), entry)) for answer in ours}
        assert verdict(verifier, "", prompt) < 0.99 or prompt.answer == ""
        assert 0.0 <= verdict(verifier, "\x00 <answer>\u202e[[[", prompt) < 0.99


def spelled_wrongly(name: str, count: int, seed: int = 7) -> tuple[list[str], set[str], set[str]]:
    """What is not as it should be: right answers that score less than 1, by spelling, and wrong ones that score 1."""
    entries, verifier = samples(name, count, seed)
    answers = [right_answer(prompt, verifier) for prompt in entries]
    known = list(dict.fromkeys(answer for answer in answers if answer is not None))
    failed: list[str] = []
    refused: set[str] = set()
    accepted: set[str] = set()
    for index, (prompt, gold) in enumerate(zip(entries, answers, strict=True)):
        if gold is None or verifier.score(verifier.known_good(prompt) or "", prompt) != 1.0:
            failed.append(f"{name} {index}: {gold!r} is not right")
            continue
        if gold:  # an empty one has no other spelling
            spelled = {spelling: text.replace("GOLD", gold) for spelling, text in SPELLINGS.items()}
            refused |= {spelling for spelling, text in spelled.items() if verdict(verifier, text, prompt) != 1.0}
        others = [answer for answer in known if answer != gold]
        other = others[index % len(others)] if others else "certainly not"
        texts = {kind: make(gold, other, prompt) for kind, make in WRONG.items()}
        scores = {kind: verdict(verifier, text, prompt) for kind, text in texts.items() if text.strip() != gold.strip()}
        assert all(0.0 <= score <= 1.0 for score in scores.values())
        accepted |= {kind for kind, score in scores.items() if score > 0.99}
    return failed, refused, accepted


@pytest.mark.parametrize("name", NAMES)
def test_spellings_and_wrong_answers(name: str) -> None:
    failed, refused, accepted = spelled_wrongly(name, FEW)
    assert not failed
    assert refused <= NOT_SPELLED.get(name, set())
    assert accepted <= ALSO_RIGHT.get(name, (set(), ""))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_spellings_and_wrong_answers_of_twice_twenty_entries(name: str) -> None:
    """Every data set that the documentation names has exceptions, and no other."""
    accepted: set[str] = set()
    for seed in (7, 21):
        failed, refused, right = spelled_wrongly(name, COUNT, seed)
        assert not failed
        assert refused == NOT_SPELLED.get(name, set())
        accepted |= right
    assert accepted <= ALSO_RIGHT.get(name, (set(), ""))[0]
    assert bool(accepted) == (name in ALSO_RIGHT)


def test_the_documentation_has_these_tables() -> None:
    assert len(SPELLINGS) >= 10 and len(WRONG) >= 12
    text = DOCUMENTATION.read_text()
    assert all(table in text for table in render().split("\n\n")), (
        "python -m tests.rewards.gym_samples prints what docs/tasks.md should have"
    )
    assert not [name for name in {*SCORERS, *FORMS, *COMPARISONS} if f"`{name}`" not in text]


def test_composite_is_refused_with_the_reason() -> None:
    task = TaskConfig(name="t", dataset="composite")
    with pytest.raises(RewardsError, match=r"composite refuses config .* at least one dataset"):
        all_entries(task, DataConfig(tasks=(task,)))
