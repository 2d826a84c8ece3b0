"""The recipes that come with the project can be read, planned and compared, without any model or download."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.config import load
from cluster.jobs import placement
from cluster.run.asked import answer_tokens
from cluster.run.sweep import grid, named_arms
from tests.hub_models import GIB, HUB_MODELS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if "arms" not in str(path))
MADE_SLOWLY = ("paper/logic.yaml", "paper/algorithmic.yaml")
SWEEPS = {
    "arms/composed.yaml": "quickstart.yaml",
    "arms/separable.yaml": "separable.yaml",
    "paper/arms.yaml": "paper/gsm8k.yaml",
}
# What the smallest card of that name offers, in GiB: an L4 and an A100.
POOLS = {"gpu24": 22.0, "gpu80": 79.0}


# Some data sets of the paper's categories take a second an entry.
@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r in MADE_SLOWLY)) for r in RECIPES])
def test_a_recipe_can_be_planned(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many prompts as the recipe says take minutes to make, for whole categories.
    tasks = yaml.safe_load((CONFIGS / recipe).read_text())["data"]["tasks"]
    few = [f"data.tasks.{i}.size=40" for i in range(len(tasks))] if recipe.startswith(("paper/", "pools/")) else []
    monkeypatch.setattr("sys.argv", ["musketeers", "train", str(CONFIGS / recipe), *few, "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "plan of workers" in capsys.readouterr().out


@pytest.mark.parametrize("arms", SWEEPS)
def test_every_arm_of_a_sweep_is_a_run_of_its_own(arms: str) -> None:
    found = named_arms(CONFIGS / arms)
    points = grid(CONFIGS / SWEEPS[arms], [], found, 1)
    assert len({yaml.safe_dump(p.config.model_dump(mode="json", exclude={"run"})) for p in points}) == len(found)


@pytest.mark.parametrize("name", ["arithmetic", "logic", "algorithmic", "gsm8k"])
def test_the_paper_s_recipes_have_the_reported_numbers_and_fit_one_gpu(name: str) -> None:
    config = load(CONFIGS / "paper" / f"{name}.yaml")
    assert config.steps == (233 if name == "gsm8k" else 500)
    assert (config.router.width, config.router.latents, config.router.heads) == (512, 8, 8)
    assert (config.sampling.samples, config.sampling.max_new_tokens, config.learner.groups) == (8, 128, 32)
    assert (config.learner.learning_rate, config.algorithm.kl.coefficient) == (1e-4, 0.04)
    assert config.policy.model == "Qwen/Qwen2.5-3B-Instruct" and config.policy.lora is not None
    assert config.policy.lora.rank == 8
    assert all((expert.pool, expert.layer) == ("last", -1) for expert in config.experts)
    assert sum(each.gpus for each in config.engines().values()) + config.learner.gpus <= 1


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_fits_the_gpu_that_it_is_named_after(pool: str) -> None:
    config = load(CONFIGS / "pools" / f"{pool}.yaml")
    models = {key: HUB_MODELS[name].described() for key, name in config.models().items()}
    needs = placement.needs(config, models)
    placement.check(needs, [placement.Node("one", 1, int(POOLS[pool] * GIB))])
    assert len(needs) == len(config.experts) + 2  # the policy and the learner: all of them are on the GPU

    # While experts answer for the baselines, transformers keeps keys and values of a whole batch.
    prompt, answer = config.data.max_prompt_tokens or 0, answer_tokens(config)
    for expert, need in zip(config.experts, needs, strict=False):
        cache = HUB_MODELS[expert.model].cache_bytes * expert.batch * (prompt + answer)
        assert placement.CONTEXT + need.weights + cache < need.share * POOLS[pool] * GIB, expert.name
        assert prompt <= expert.max_tokens <= HUB_MODELS[expert.model].longest - answer


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_heterogeneous_and_needs_no_account(pool: str) -> None:
    config = load(CONFIGS / "pools" / f"{pool}.yaml")
    assert len({expert.model for expert in config.experts}) == len(config.experts) >= 3
    assert len({expert.model.partition("/")[0] for expert in config.experts}) >= 2
    assert not any(name.startswith(("meta-llama/", "google/")) for name in config.models().values())
