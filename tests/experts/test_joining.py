"""One more expert for a trained router: what it says stays nearly the same, and nobody else's weights move."""

from __future__ import annotations

import pytest
import torch

from experts.config import RouterConfig
from experts.joining import is_of, settle, train_only, with_newcomers
from experts.router import Perceiver
from experts.state import RouterError, put_arrays, take_arrays

CONFIG = RouterConfig(width=64, heads=4, latents=3)
WIDTHS, TOKENS = {"old": 24, "other": 10, "new": 8}, {"old": 1, "other": 2, "new": 3}


def router(*experts: str, seed: int = 0, config: RouterConfig = CONFIG) -> Perceiver:
    """A router whose attention and gate prefer some states to others, as a trained one's do."""
    torch.manual_seed(seed)
    made = Perceiver(config, [WIDTHS[name] for name in experts], 12, 1.0, learned_norms=[True] * len(experts))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(
                0.05 * torch.randn_like(parameter) if name.split(".")[0] in ("key", "query", "choose") else 0
            )
    return made


def features(*experts: str, prompts: int = 300) -> list[torch.Tensor]:
    """States of each expert, the same in every call."""
    made = []
    for name in experts:
        generator = torch.Generator().manual_seed(len(name))
        made.append(3 * torch.randn(prompts, TOKENS[name], WIDTHS[name], generator=generator) + 1)
    return made


def joined(saved: Perceiver, config: RouterConfig = CONFIG, settled: bool = True) -> Perceiver:
    """A router of old and other, with new between them and the order of the old ones changed."""
    torch.manual_seed(1)
    fresh = Perceiver(config, [WIDTHS[name] for name in ("other", "new", "old")], 12, 1.0, learned_norms=[True] * 3)
    put_arrays(fresh, with_newcomers(take_arrays(saved), take_arrays(fresh), [2, 0], [1], "somewhere"))
    if settled:
        settle(fresh, features("other", "new", "old"), [1], 0.01)
    return fresh


def everybody(prompts: int, experts: int) -> torch.Tensor:
    """All experts visible."""
    return torch.ones(prompts, experts, dtype=torch.bool)


def test_names_decide_whose_weights_are_whose() -> None:
    saved = router("old", "other")
    both = joined(saved)
    hidden = everybody(300, 3)
    hidden[:, 1] = False
    was = saved(features("old", "other"), everybody(300, 2))
    now = both(features("other", "new", "old"), hidden)
    assert torch.allclose(was.prefix, now.prefix, atol=1e-6)
    assert torch.allclose(was.attention, now.attention[..., [2, 0]], atol=1e-6) and not now.attention[..., 1].any()


@pytest.mark.parametrize("null", [False, True])
def test_a_new_expert_is_noticed_and_disturbs_little(null: bool) -> None:
    config = CONFIG.model_copy(update={"null_expert": null})
    saved = router("old", "other", config=config)
    was = saved(features("old", "other"), everybody(300, 2)).prefix
    settled, blind = joined(saved, config), joined(saved, config, settled=False)
    out, raw = (made(features("other", "new", "old"), everybody(300, 3)) for made in (settled, blind))
    share = out.attention[..., 1].mean(dim=0)
    assert share.min() > 0.02 and share.max() < 0.15, share
    assert raw.attention[..., 1].mean() > 0.25, "or there is nothing to settle"
    off, before = ((made.prefix - was).pow(2).mean().sqrt() / was.std() for made in (out, raw))
    assert off < 0.4 * before and off < 0.25, (off, before)


def test_settling_moves_the_new_experts_projection_and_mark_alone() -> None:
    saved = router("old", "other")
    before, after = take_arrays(joined(saved, settled=False)), take_arrays(joined(saved))
    moved = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert moved == {"project.1.weight", "project.1.bias", "expert_embedding.1"}


def test_no_choice_changes_with_a_new_expert() -> None:
    config = CONFIG.model_copy(update={"gate": True})
    saved = router("old", "other", config=config)
    pick = torch.zeros(300, dtype=torch.int64)
    was = saved(features("old", "other"), everybody(300, 2), lambda _: pick).options
    now = joined(saved, config)(features("other", "new", "old"), everybody(300, 3), lambda _: pick).options
    assert was is not None and now is not None and was.std() > 0
    assert torch.allclose(was, now, atol=1e-6)


def test_only_what_is_the_new_experts_trains() -> None:
    made = router("old", "other", "new", config=CONFIG.model_copy(update={"gate": True}))
    train_only(made, [2])
    trained = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trained == {
        "norms.2.weight",
        "norms.2.bias",
        "project.2.weight",
        "project.2.bias",
        "expert_embedding.2",
        "choose.read.2.0.weight",
        "choose.read.2.0.bias",
        "choose.read.2.1.weight",
    }
    assert not is_of("project.12.weight", [1, 2]) and not is_of("feedforward.1.weight", [1])


def test_a_router_of_other_parts_is_refused() -> None:
    saved, fresh = take_arrays(router("old", "other")), take_arrays(router("other", "new", "old"))
    wide = {**saved, "latents": saved["latents"][:2]}
    with pytest.raises(RouterError, match=r"somewhere: latents is \(2, 64\) there and \(3, 64\) here"):
        with_newcomers(wide, fresh, [2, 0], [1], "somewhere")
    with pytest.raises(RouterError, match="it has a null, and a router of these settings has none"):
        with_newcomers({**saved, "null": saved["latents"][0]}, fresh, [2, 0], [1], "somewhere")
    del saved["norms.0.bias"]
    with pytest.raises(RouterError, match=r"it has no norms\.2\.bias"):
        with_newcomers(saved, fresh, [2, 0], [1], "somewhere")
