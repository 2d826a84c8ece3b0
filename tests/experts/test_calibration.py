"""Calibration folds a whitening of the experts' states into the router's first weights."""

import pytest
import torch

from experts.config import CalibrationConfig, RouterConfig
from experts.router import Perceiver

WIDTHS = (24, 40)


def states(width: int, seed: int) -> torch.Tensor:
    """(300, 1, width) states with a few strong directions, an offset, and almost none of the rest."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.tensor([9.0, 3.0, 1.5] + [1e-3] * (width - 3))
    turn = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    return (torch.randn(300, width, generator=g) * scales @ turn + 2.0)[:, None]


def router() -> Perceiver:
    """A fresh router with the same blind weights every time."""
    torch.manual_seed(0)
    return Perceiver(RouterConfig(width=64, heads=4, latents=3), WIDTHS, 16, 0.1)


def calibrated() -> tuple[Perceiver, list[torch.Tensor]]:
    """A router that has looked at its features."""
    features = [states(width, seed) for seed, width in enumerate(WIDTHS)]
    made = router()
    made.calibrate(features, ridge=1e-4)
    return made, features


def test_projected_states_are_white_in_the_directions_that_matter() -> None:
    made, features = calibrated()
    for project, feature in zip(made.project, features, strict=True):
        rows = project(feature).flatten(0, 1).detach()
        assert rows.mean(dim=0).abs().max() < 1e-3
        assert rows.var(dim=0, correction=0).mean() == pytest.approx(1.0, rel=0.35)
        strong = torch.linalg.svdvals(feature[:, 0] - feature[:, 0].mean(dim=0))
        white = torch.linalg.svdvals(rows)
        assert strong[0] / strong[2] > 4
        assert white[0] / white[2] < 2
        assert white[3] < 0.1 * white[2], "noise was blown up to the size of the signal"


def test_the_order_of_the_prompts_does_not_matter() -> None:
    first, features = calibrated()
    second = router()
    second.calibrate([torch.flip(f, dims=[0]) for f in features], ridge=1e-4)
    for one, other in zip(first.project, second.project, strict=True):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-4, atol=1e-5)


def test_nothing_but_the_input_projections_changes() -> None:
    made, _ = calibrated()
    before, after = router().state_dict(), made.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"project.{i}.{part}" for i in range(2) for part in ("weight", "bias")}


def test_an_expert_that_always_says_the_same_keeps_its_blind_projection() -> None:
    made = router()
    made.calibrate([torch.ones(5, 1, width) for width in WIDTHS], ridge=0.01)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), router().parameters(), strict=True))


def test_one_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router\.calibration\.prompts: 1 prompt has no variance"):
        CalibrationConfig(prompts=1)
