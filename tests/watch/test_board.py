from __future__ import annotations

from pathlib import Path

import pytest

from cluster.watch.board import Board


def test_events_after_the_checkpoint_are_hidden_on_resume(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Board(tmp_path) as board:
        for step in (1, 2, 3):
            board.step(step, {"step": step, "ordinals": [step], "reward/mean": 0.25 * step})
    with Board(tmp_path, resume_after=2) as board:
        board.step(3, {"reward/mean": -1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5), (3, -1.0)]
