"""The `data` section by itself."""

from __future__ import annotations

import pytest
import yaml

from rewards.config import DataConfig, RewardsConfig, TaskConfig


def test_a_glimpse_is_some_of_what_is_made_and_all_of_what_could_be_missing() -> None:
    tasks = [
        {"name": "puzzles", "category": "logic", "size": 2000},
        {"name": "few", "dataset": "chain_sum", "size": 30},
        {"name": "narrow", "dataset": "chain_sum", "answers": {"min": 0, "max": 3}},
        {"name": "part", "dataset": "leg_counting"},
        {"name": "both", "compose": ["narrow", "part"]},
        {"name": "file", "path": "problems.jsonl"},
        {"name": "away", "hub": "openai/gsm8k"},
    ]
    seen = DataConfig(tasks=tasks).glimpse()  # type: ignore[arg-type]
    assert seen is not None
    whole = TaskConfig.model_fields["size"].default
    assert {task.name: task.size for task in seen.tasks} == {
        "puzzles": 100, "few": 30, "narrow": whole, "part": whole, "both": whole, "file": whole
    }  # fmt: skip
    assert DataConfig(tasks=tasks[-1:]).glimpse() is None  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["require", "best_effort", "off", '"off"'])
def test_the_jail_s_settings_can_be_written_bare(word: str) -> None:
    """YAML reads some bare words as truth values."""
    assert RewardsConfig.model_validate(yaml.safe_load(f"jail: {word}")).jail == word.strip('"')
