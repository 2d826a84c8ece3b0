"""A trained router without a training: random models, a random router, saved as a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from cluster.config import parse
from cluster.run.start import shape_of
from cluster.serve.local import Musketeers
from cluster.serve.opening import ready
from experts.config import CacheConfig
from experts.expert import Expert
from experts.loading import load_frozen
from experts.state import RouterSnapshot, build_router, embedding_rms, save_router, take_arrays
from tests.models import make

RECIPE = {
    "run": "tiny",
    "steps": 1,
    "execution": "inline",
    "threads": 1,
    "data": {
        "template": "Q: {question}\nA:",
        "tasks": [{"name": "digits", "plugin": "tests.plugins:Digits"}],
    },
    "router": {"width": 32, "heads": 4, "latents": 4, "prefix": {"scale": 0.05}},
    "sampling": {"samples": 4, "max_new_tokens": 6},
}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder; the models lie beside it."""
    folder = tmp_path_factory.mktemp("trained")
    families = {"policy": ("qwen2", 32), "one": ("llama", 24), "two": ("gpt_neox", 32)}
    for seed, (name, (family, width)) in enumerate(families.items()):
        make(folder / name, family, width=width, seed=seed)
    experts = [{"name": n, "model": str(folder / n), "max_tokens": 32} for n in ("one", "two")]
    return save_bundle(folder / "bundle", RECIPE | {"experts": experts, "policy": {"model": str(folder / "policy")}})


def save_bundle(folder: Path, values: dict) -> Path:
    """A fresh router for these models, as if it had been trained."""
    config = parse(values, "the test")
    infos = []
    for each in config.experts:
        expert = Expert(each, each.model, CacheConfig(), 1)
        infos.append(expert.info())
        expert.close()
    policy = load_frozen(config.policy.model, lora=config.policy.lora)
    about = {"width": policy.width, "fingerprint": policy.fingerprint(), "embedding_rms": embedding_rms(policy)}
    shape = shape_of(config, infos, about)
    router = build_router(config.router, shape, policy, seed=5)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_router(folder, RouterSnapshot.of(take_arrays(router), 1, 0), shape, config.router)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return folder


@pytest.fixture(scope="session")
def musketeers(bundle: Path):
    """The bundle in this process."""
    with Musketeers(ready(bundle)) as opened:
        yield opened
