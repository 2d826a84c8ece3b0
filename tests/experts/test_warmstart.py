"""A router that starts from the experts' words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experts.config import RouterConfig, WarmStartConfig
from experts.loading import FrozenModel, load_frozen
from experts.router import router_class
from experts.warmstart import WarmStartError, spoken, warm_start
from tests.models import make

WIDTHS = (12, 20)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    """A random policy with a token a character."""
    folder: Path = make(tmp_path_factory.mktemp("policy"), "qwen2")
    return load_frozen(str(folder))


def world(count: int = 600) -> tuple[list[torch.Tensor], list[str]]:
    """States that hold a digit each, in their own directions, and the text `a+b##`."""
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(0, 6, (count, 2), generator=generator)
    features = []
    for column, width in enumerate(WIDTHS):
        codes = torch.randn(6, width, generator=generator)
        features.append((codes[digits[:, column]] + 0.05 * torch.randn(count, width, generator=generator))[:, None])
    return features, [f"{a}+{b}" + "=" * (row % 2) for row, (a, b) in enumerate(digits.tolist())]


def test_the_first_tokens_of_a_text_are_what_the_slots_are_to_hold(policy: FrozenModel) -> None:
    wanted = spoken(["1+2=", "7", ""], policy, 3)
    tokens = policy.tokenizer("1+2", add_special_tokens=False)["input_ids"]
    assert torch.equal(wanted.embeddings[0], policy.embed(torch.tensor(tokens)))
    assert wanted.present.tolist() == [[True] * 3, [True, False, False], [False] * 3]


@pytest.mark.parametrize("kind", ["perceiver", "top1", "static"])
def test_only_a_router_that_sees_all_experts_comes_to_say_what_they_say(policy: FrozenModel, kind: str) -> None:
    features, texts = world()
    config = RouterConfig(width=64, heads=4, latents=4, kind=kind, warm_start=WarmStartConfig(steps=150, batch=64))
    torch.manual_seed(0)
    router = router_class(kind)(config, WIDTHS, policy.width, 0.2)
    before, after = warm_start(router, features, 2, spoken(texts, policy, 4), config.warm_start, seed=0)
    assert before == pytest.approx(1.0, abs=0.1)
    assert after < 0.05 if kind == "perceiver" else after > 0.15


def test_slots_that_no_text_fills_and_an_adapter_stay_as_they_are(policy: FrozenModel) -> None:
    features, texts = world(200)
    config = RouterConfig(width=64, heads=4, latents=6, warm_start=WarmStartConfig(steps=5, batch=64, weight_decay=0.0))
    torch.manual_seed(0)
    router = router_class("perceiver")(config, WIDTHS, policy.width, 0.2)
    router.adapter = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(2))})
    output = router.output.detach().clone()
    warm_start(router, features, 2, spoken(texts, policy, 6), config.warm_start, seed=0)
    moved = (router.output.detach() - output).abs().amax(dim=(1, 2)) > 0
    assert moved.tolist() == [True] * 4 + [False] * 2
    assert torch.equal(router.adapter["a"], torch.ones(2))


def test_experts_that_say_nothing_teach_nothing(policy: FrozenModel) -> None:
    features, _ = world(20)
    router = router_class("perceiver")(RouterConfig(width=64, heads=4, latents=4), WIDTHS, policy.width, 0.2)
    with pytest.raises(WarmStartError, match="give no text to learn"):
        warm_start(router, features, 2, spoken([""] * 20, policy, 4), WarmStartConfig(steps=1), seed=0)


def test_a_template_without_answers_in_front_is_refused() -> None:
    values = {"warm_start": {"steps": 1}, "text": {"template": "{prompt} {answers}"}}
    with pytest.raises(ValueError, match=r"with answers in front of \{prompt\}"):
        RouterConfig.model_validate(values)
