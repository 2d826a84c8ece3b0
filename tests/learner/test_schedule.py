"""The learning rate is a pure function of the step."""

import pytest

from learner.config import LearnerConfig
from learner.schedule import learning_rate


def rates(steps: int = 100, **settings: object) -> list[float]:
    """Every step's rate, as a share of the configured one."""
    config = LearnerConfig.model_validate({"learning_rate": 1.0, "warmup_steps": 9, **settings})
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_warm_up_rises_evenly_and_then_a_constant_rate_stays() -> None:
    found = rates()
    assert found[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(found[10:]) == {1.0}


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.55), ("cosine", 0.55)])
def test_a_falling_rate_ends_where_it_should(schedule: str, half: float) -> None:
    found = rates(schedule=schedule, final_rate=0.1)
    assert found[-1] == pytest.approx(0.1)
    assert found[49] == pytest.approx(half)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_steps_past_the_end_keep_the_final_rate() -> None:
    config = LearnerConfig(learning_rate=1.0, schedule="linear", final_rate=0.2)
    assert learning_rate(config, 500, 100) == pytest.approx(0.2)
