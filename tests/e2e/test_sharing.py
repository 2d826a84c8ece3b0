"""A router that is exported, started from again, and joined by one more expert, all by the real command."""

from __future__ import annotations

import json

import pytest
import yaml

from cluster.run.trained import open_trained
from experts.joining import is_of, moved
from tests.e2e.conftest import Runs

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_one_more_expert_joins_a_bundle(runs: Runs) -> None:
    recipe = yaml.safe_load(runs.recipe.read_text())
    one, two = recipe["experts"]
    alone = runs.train("steps=2", f"experts=[{json.dumps(one)}]")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    bundle = runs.folder / "bundle"
    done = runs.start([*runs.command()[:3], "export", str(runs.folder / "runs" / "run"), str(bundle)])
    assert done.returncode == 0 and str(bundle) in done.stdout.replace("\n", ""), done.stdout + done.stderr

    settings = [
        "run=both",
        f"experts=[{json.dumps(two)},{json.dumps(one)}]",
        f"router.init={bundle}",
        "router.add_expert=[two]",
        "learner.weight_decay=0.1",
    ]
    joined = runs.train("steps=2", *settings)
    assert joined.returncode == 0, joined.stdout + joined.stderr
    more = runs.train("steps=4", *settings, "--resume")
    assert more.returncode == 0, more.stdout + more.stderr
    assert [line["step"] for line in runs.metrics("both")] == [1, 2, 3, 4]
    assert all(line["router/grad_norm"] > 0 for line in runs.metrics("both"))

    was = moved(open_trained(bundle).snapshot.arrays, [1])
    start, end = (open_trained(runs.folder / "runs" / "both", step).snapshot.arrays for step in (0, 4))
    assert set(end) - set(was) == {name for name in end if is_of(name, [0])}
    assert all(end[name].tobytes() == array.tobytes() for name, array in was.items())
    assert all(end[name].tobytes() != start[name].tobytes() for name in end if is_of(name, [0]))
    summary = runs.summary("both")
    assert summary["router_parameters_trained"] == sum(end[name].size for name in end if is_of(name, [0]))
    assert summary["router_parameters"] > summary["router_parameters_trained"]

    again = runs.start([*runs.command()[:3], "replay", str(runs.folder / "runs" / "both"), "--step", "4"])
    assert again.returncode == 0, again.stdout + again.stderr
    wrong = runs.train("run=wrong", f"router.init={bundle}", "router.add_expert=[one]")
    assert wrong.returncode == 2 and "router.add_expert: " in wrong.stderr, wrong.stderr
