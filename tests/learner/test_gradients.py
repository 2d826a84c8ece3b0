"""Raw gradients, which neither clip nor Adam can hide: ranks x micro-batches x ZeRO stages, against plain torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.state import Arrays, RouterSnapshot, stack_features
from learner.algorithms import build_algorithm
from learner.batch import global_denominators
from learner.config import AlgorithmConfig, KLConfig
from learner.engine import Rendezvous, free_port
from learner.gradient import PrefixGradient
from rollout.types import Group, Prompt
from tests.learner.gradient_cases import CASES, algorithm, at_version_one, gradients, second_router
from tests.learner.naive import plain_gradients
from tests.learner.world import World, encode, made_up_scores, score

TOLERANCE = 1e-5
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def routers(world, deepspeed_alone) -> dict[int, RouterSnapshot]:
    """The router that sampled half the groups, and the one being trained, which sampled the others."""
    return at_version_one(world.learner()).history


def alike(count: int) -> list[Prompt]:
    """Prompts of 8 to 13 tokens: unequal, yet near enough for one micro-batch to hold them all."""
    texts = ["sum 4 5 6 and 7"[: 8 + 5 * n % 6] for n in range(count)]
    return [
        Prompt(ordinal=n, task="t", messages=({"role": "user", "content": text},), answer="")
        for n, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def groups(world: World, routers) -> list[Group]:
    """14 groups of unequal lengths from two versions; of every second one, a rank's share, little is valid."""
    made: list[Group] = []
    for prompt in alike(14):
        (group,) = world.roll([prompt], routers[prompt.ordinal // 2 % 2], temperature=0.9).groups
        scores: list[float | None] = [*made_up_scores(prompt.ordinal, 4)]
        if prompt.ordinal % 2:
            scores = [None] * 4 if prompt.ordinal != 5 else [None, 1.0, 0.0, None]
        elif prompt.ordinal == 4:
            scores[1] = None
        made.append(score(group, scores))
    return made


@pytest.fixture(scope="module")
def processes(world: World, groups, tmp_path_factory) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]]]]:
    """Two ranks at work on all cases, while this process does its own."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "policy").symlink_to(world.policy)
    (folder / "groups.pickle").write_bytes(pickle.dumps(groups))
    command = [sys.executable, "-m", "tests.learner.gradient_cases"]
    port = str(free_port())
    with (folder / "log").open("wb") as log:
        ranks = [
            subprocess.Popen([*command, str(rank), "2", port, str(folder)], cwd=ROOT, stdout=log, stderr=log)
            for rank in range(2)
        ]
        yield folder, ranks
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.fixture(scope="module")
def one_rank(world: World, groups, processes) -> dict[str, np.ndarray]:
    """All cases in this process."""
    return gradients(world, Rendezvous(), groups)


@pytest.fixture(scope="module")
def two_ranks(one_rank, processes) -> list[dict[str, np.ndarray]]:
    """What the two real processes found."""
    folder, ranks = processes
    codes = [rank.wait(timeout=240) for rank in ranks]
    assert codes == [0, 0], (folder / "log").read_text()[-3000:]
    return [dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(2)]


@pytest.fixture(scope="module")
def wanted(world: World, groups, routers) -> dict[str, Arrays]:
    """Plain torch's gradients for each aggregation."""
    arrays = {version: snapshot.arrays for version, snapshot in routers.items()}
    names = ("sequence", "token", "constant")
    return {name: plain_gradients(world, groups, arrays, 1, algorithm(name)) for name in names}


def error(found: dict[str, np.ndarray], case: tuple[int | str, ...], wanted: dict[str, Arrays]) -> float:
    """Largest relative error of a parameter's gradient.

    A gradient that is 0 in exact arithmetic (a key's bias shifts all scores alike) has no relative error; it is
    measured against the whole gradient.
    """
    reference = wanted[case[-1]]
    whole = np.sqrt(sum(np.square(g).sum() for g in reference.values()))
    errors = []
    for name, right in reference.items():
        off = np.linalg.norm(found["/".join(map(str, (*case, name)))] - right)
        scale = np.linalg.norm(right)
        errors.append(off / (scale if scale > 1e-9 * whole else whole))
    return float(max(errors))


def learner_inputs(groups, features) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the router takes."""
    visible = torch.from_numpy(np.stack([g.draws.expert_mask for g in groups]))
    return stack_features(features), visible


cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


@cases
def test_one_rank_has_plain_torch_gradients(one_rank, wanted, case):
    assert error(one_rank, case, wanted) < TOLERANCE


@cases
def test_two_ranks_have_plain_torch_gradients(two_ranks, wanted, case):
    """Each rank holds the whole update's gradient, not its own share nor the ranks' mean."""
    for rank in two_ranks:
        assert error(rank, case, wanted) < TOLERANCE


def test_without_a_kl_term_groups_without_signal_are_not_computed_and_the_gradient_is_the_same(
    world: World, groups, routers
):
    learner = world.learner(staleness=1, kl={"coefficient": 0.0})
    learner.restore(at_version_one(learner), 0)
    computed: list[int] = []
    loss = learner.gradient._loss
    learner.gradient._loss = lambda some, *rest: (computed.extend(g.ordinal for g in some), loss(some, *rest))[1]  # type: ignore[method-assign]
    features = [list(e.features) for e in encode([g.prompt for g in groups])]
    learner.backward(groups, features, global_denominators(groups, None))
    found = learner.engine.gradients()
    learner.finish_update()
    config = learner.gradient.algorithm.config
    right = plain_gradients(world, groups, {v: s.arrays for v, s in routers.items()}, 1, config)
    assert error({f"one/{name}": array for name, array in found.items()}, ("one",), {"one": right}) < TOLERANCE
    assert sorted(computed) == [g.ordinal for g in groups if len({s.reward for s in g.scores if s.status == "ok"}) > 1]
    assert 0 < len(computed) < len(groups)


def test_a_share_of_the_groups_kl_gives_the_whole_kl_s_gradient_on_average(world: World, groups, routers):
    """Over many draws the mean of the gradients is that of the whole penalty, within its own standard error."""
    config = {"kl": {"coefficient": 0.3, "share": 0.3}}
    learner = world.learner(staleness=1, **config)
    learner.restore(at_version_one(learner), 0)
    features = [list(e.features) for e in encode([g.prompt for g in groups])]
    denominators = global_denominators(groups, None)
    with torch.no_grad():
        prefix = learner.engine(*learner_inputs(groups, features)).prefix
        old = learner._old_prefix(groups, *learner_inputs(groups, features), prefix)

    def gradient(share: float, seed: int) -> torch.Tensor:
        kl = KLConfig(coefficient=0.3, share=share)
        algorithm = AlgorithmConfig(kl=kl)
        one = PrefixGradient(learner.policy, build_algorithm(algorithm), "front", 10**6, kl, seed)
        return one(groups, prefix, old, None, denominators)[0]

    whole = gradient(1.0, 0)
    draws = torch.stack([gradient(0.3, seed) for seed in range(150)])
    error = (draws.mean(dim=0) - whole).norm()
    spread = (draws - draws.mean(dim=0)).flatten(1).norm(dim=1).square().mean().sqrt() / len(draws) ** 0.5
    assert error < 2 * spread
    assert spread < 0.2 * whole.norm(), "too few draws to say anything"


def test_only_the_chosen_groups_and_those_with_signal_are_computed(world: World, groups, routers):
    learner = world.learner(staleness=1, kl={"coefficient": 0.3, "share": 0.3})
    learner.restore(at_version_one(learner), 0)
    features = [list(e.features) for e in encode([g.prompt for g in groups])]
    sums = learner.backward(groups, features, global_denominators(groups, None))
    learner.finish_update()
    chosen = [learner.gradient._is_measured(g) for g in groups]
    assert 0 < sum(chosen) < len(groups)
    valid = [
        sum(len(c.tokens) for c, s in zip(g.completions, g.scores, strict=True) if s.status == "ok") for g in groups
    ]
    signal = [len({s.reward for s in g.scores if s.status == "ok"}) > 1 for g in groups]
    assert sums.values["kl_tokens"] == sum(n for n, mine in zip(valid, chosen, strict=True) if mine)
    assert sums.values["tokens"] == sum(n for n, a, b in zip(valid, chosen, signal, strict=True) if a or b)


def test_the_cases_are_not_trivial(groups, wanted, routers):
    """The versions differ, the ranks' shares are uneven, and every parameter but a key's bias learns."""
    shares = [sum(s.status == "ok" for g in groups[rank::2] for s in g.scores) for rank in range(2)]
    assert shares == [27, 2]
    assert {g.router.version for g in groups} == {0, 1}
    assert second_router(routers[0].arrays).keys() == wanted["sequence"].keys()
    still = [name for name, g in wanted["sequence"].items() if np.abs(g).max() < 1e-12]
    assert still == ["key.bias"]
