"""What a router gets of a prompt: which states, how normalised, and how several stand beside each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from experts.config import CacheConfig, ExpertConfig, RouterConfig
from experts.expert import Expert
from experts.loading import load_embeddings, load_frozen, stored_sha256
from experts.router import Perceiver
from experts.state import stack_features
from tests.models import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return make(tmp_path_factory.mktemp("models") / "it", "llama", width=24)


def encoded(folder: Path, texts: list[str], **settings: object) -> list[np.ndarray]:
    """Features of some texts."""
    config = ExpertConfig.model_validate({"name": "it", "model": str(folder)} | settings)
    expert = Expert(config, str(folder), CacheConfig())
    return list(expert.encode([({"role": "user", "content": text},) for text in texts]).features)


def test_the_last_k_states_are_those_of_the_whole_prompt(folder: Path) -> None:
    frozen = load_frozen(str(folder))
    texts = ["12 + 34 =", "ab", "long " * 8]
    for text, found in zip(texts, encoded(folder, texts, pool="last_k", last_k=3, norm="none"), strict=True):
        with torch.no_grad():
            tokens = torch.tensor([frozen.tokenizer(text)["input_ids"]])
            states = frozen.model.base_model(input_ids=tokens).last_hidden_state[0, -3:].numpy()
        assert found.shape == states.shape
        assert np.abs(found - states).max() < 1e-5


def test_what_is_not_kept_is_made_again(folder: Path) -> None:
    expert = Expert(ExpertConfig(name="it", model=str(folder)), str(folder), CacheConfig())
    asked = [({"role": "user", "content": text},) for text in ("1 + 2 =", "long " * 8)]
    once = expert.encode(asked, keep=False)
    assert len(expert.cache) == 0 and once.misses == 2
    kept = expert.encode(asked)
    assert kept.misses == 2 and expert.encode(asked, keep=False).hits == 2
    assert all(np.array_equal(a, b) for a, b in zip(once.features, kept.features, strict=True))


def test_norms(folder: Path) -> None:
    (plain,) = encoded(folder, ["12 + 34 ="], norm="none")
    for norm in ("layer", "learned"):
        (found,) = encoded(folder, ["12 + 34 ="], norm=norm)
        assert found.mean() == pytest.approx(0, abs=1e-6) and found.std() == pytest.approx(1, abs=1e-3)
        assert np.corrcoef(found[0], plain[0])[0, 1] == pytest.approx(1)


def router(**settings: object) -> Perceiver:
    """One over two experts."""
    torch.manual_seed(0)
    config = RouterConfig.model_validate({"width": 16, "heads": 2, "latents": 3})
    return Perceiver(config, (24, 8), 12, 1.0, **settings)  # type: ignore[arg-type]


def test_a_short_prompt_s_missing_states_take_no_part() -> None:
    rng = np.random.default_rng(0)
    long, short = (rng.standard_normal((n, 24)).astype(np.float32) for n in (4, 2))
    other = rng.standard_normal((2, 1, 8)).astype(np.float32)
    perceiver, seen = router(), torch.ones(2, 2, dtype=torch.bool)
    together = perceiver(stack_features([[long, short], list(other)]), seen)
    alone = perceiver(stack_features([[short], [other[1]]]), seen[:1])
    assert torch.allclose(together.prefix[1], alone.prefix[0], atol=1e-6)
    assert torch.allclose(together.attention.sum(-1), torch.ones(2, 2, 3))


def test_the_order_of_several_states_matters() -> None:
    rng = np.random.default_rng(0)
    states, other = rng.standard_normal((4, 24)).astype(np.float32), rng.standard_normal((1, 8)).astype(np.float32)
    perceiver, seen = router(), torch.ones(1, 2, dtype=torch.bool)
    forwards = perceiver(stack_features([[states], [other]]), seen).prefix
    backwards = perceiver(stack_features([[states[::-1].copy()], [other]]), seen).prefix
    assert not torch.allclose(forwards, backwards, atol=1e-3)


def test_a_learned_norm_trains_a_gain_and_a_bias_of_that_expert_alone() -> None:
    plain, learned = router(), router(learned_norms=(True, False))
    new = set(learned.state_dict()) - set(plain.state_dict())
    assert new == {"norms.0.weight", "norms.0.bias"}
    features = stack_features([[np.ones((1, 24), np.float32)], [np.ones((1, 8), np.float32)]])
    learned(features, torch.ones(1, 2, dtype=torch.bool)).prefix.sum().backward()
    assert learned.norms[0].weight.grad is not None  # type: ignore[union-attr]


def test_a_model_is_the_same_however_its_files_are_cut_and_whatever_dtype_it_runs_in(
    folder: Path, tmp_path: Path
) -> None:
    frozen = load_frozen(str(folder))
    frozen.model.save_pretrained(tmp_path, max_shard_size="20KB")
    frozen.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert stored_sha256(str(folder)) == stored_sha256(str(tmp_path))
    assert load_frozen(str(tmp_path), "bfloat16").fingerprint() == frozen.fingerprint()
    embeddings = load_embeddings(str(tmp_path), "bfloat16")
    assert embeddings.fingerprint() == frozen.fingerprint() and embeddings.parameters == frozen.parameters
    tokens = torch.tensor([3, 5])
    assert torch.equal(embeddings.embed(tokens), frozen.embed(tokens).bfloat16())
    assert not any(parameter.requires_grad for parameter in embeddings.model.parameters())


def test_what_a_cache_on_disk_saved_is_told_by_a_process_that_read_nothing(folder: Path, tmp_path: Path) -> None:
    config = ExpertConfig.model_validate({"name": "it", "model": str(folder)})
    prompts = [({"role": "user", "content": text},) for text in ("1 + 2 =", "3 + 4 + 5 =")]

    def costs() -> tuple[float, float]:
        encoded = Expert(config, str(folder), CacheConfig(disk=str(tmp_path))).encode(prompts)
        return encoded.operations, encoded.cold

    fresh, warm = costs(), costs()
    assert fresh[0] == fresh[1] > 0
    assert warm == (0.0, fresh[1])


def test_an_untrained_expert_has_the_architecture_and_nothing_else_of_the_stored_one(folder: Path) -> None:
    settings = {"name": "it", "model": str(folder)}
    stored, random, again = (
        Expert(ExpertConfig.model_validate(settings | {"weights": weights}), str(folder), CacheConfig())
        for weights in ("stored", "random", "random")
    )
    torch.rand(7)
    prompts = [({"role": "user", "content": "12 + 34 ="},)]
    one, other, third = (expert.encode(prompts) for expert in (stored, random, again))
    assert one.features[0].shape == other.features[0].shape
    assert abs(np.corrcoef(one.features[0][0], other.features[0][0])[0, 1]) < 0.9
    assert np.array_equal(other.features[0], third.features[0]) and other.keys == third.keys
    assert one.keys != other.keys, "cached states of one would be taken for the other's"
    assert stored.info()["fingerprint"] != random.info()["fingerprint"] == again.info()["fingerprint"]
    assert stored.sha256() != random.sha256() == again.sha256()
    with pytest.raises(ValueError, match="weights: random needs engine: transformers"):
        ExpertConfig.model_validate(settings | {"weights": "random", "engine": "vllm"})
