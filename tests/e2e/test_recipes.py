"""The recipes that come with the project can be read, planned and compared, without any model or download."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.config import load
from cluster.run.sweep import grid, named_arms

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml") if "arms" not in str(path))
MADE_SLOWLY = ("paper/logic.yaml", "paper/algorithmic.yaml")
SWEEPS = {
    "arms/composed.yaml": "quickstart.yaml",
    "arms/separable.yaml": "separable.yaml",
    "paper/arms.yaml": "paper/gsm8k.yaml",
}


# Some data sets of the paper's categories take a second an entry.
@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r in MADE_SLOWLY)) for r in RECIPES])
def test_a_recipe_can_be_planned(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many prompts as the recipe says take minutes to make, for whole categories.
    few = ["data.tasks.0.size=40"] if recipe.startswith("paper/") else []
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
