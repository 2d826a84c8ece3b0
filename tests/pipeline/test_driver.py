"""The real driver over no-op engines: overlap, bounds, deaths, hangs, poison, filtering."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from cluster.run import watchdog
from cluster.run.recovery import RunError
from experts.state import RouterSnapshot
from learner.engine import OptimizerState
from tests.pipeline.fake_fleet import Death, Loss, Stage, World, config, finished_group


def assert_whole(stage: Stage, steps: int = 20, groups: int = 6) -> None:
    """Every prompt ended once, every update has its groups, the bound holds."""
    a = stage.admission
    assert [record["step"] for record in stage.notes.steps] == list(range(1, steps + 1))
    ordinals = [ordinal for record in stage.notes.steps for ordinal in record["ordinals"]]
    assert len(ordinals) == len(set(ordinals)) == steps * groups
    assert a.trained == set(ordinals)
    assert a.trained | a.filtered | a.dead == set(range(a.next_ordinal))
    assert not a.running and not a.retry and not a.finished
    assert max(record["staleness/max"] for record in stage.notes.steps) <= stage.config.max_staleness
    assert {ordinal for _, ordinal in stage.world.trained} == set(ordinals), "an update was lost or repeated"


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("per_call", [1, 4, 6])
def test_it_trains_every_prompt_once_within_the_bound(staleness: int, per_call: int) -> None:
    stage = Stage(config(max_staleness=staleness, pipeline={"prompts_per_call": per_call}), World())
    stage.run()
    assert_whole(stage)
    assert [step for step, *_ in stage.notes.checkpoints] == [4, 8, 12, 16, 20]
    if staleness:
        assert max(record["staleness/max"] for record in stage.notes.steps) > 0, "nothing ran ahead"


@pytest.mark.parametrize(("staleness", "per_call"), [(0, 6), (0, 3), (2, 6)])
def test_features_are_made_once_and_those_of_the_next_update_ahead(staleness: int, per_call: int) -> None:
    stage = Stage(config(max_staleness=staleness, pipeline={"prompts_per_call": per_call}), World())
    stage.run()
    assert_whole(stage)
    calls = 20 * 6 // per_call
    assert stage.world.timeline.count("encode") == stage.world.timeline.count("sample") == calls
    before_first_update = stage.world.timeline[: stage.world.timeline.index("update")]
    assert before_first_update.count("encode") >= 2 * 6 // per_call


@pytest.mark.parametrize("name", ["Expert(0)", "Rollout(1)", "Reward(0)", "Learner(0)"])
def test_a_worker_that_dies_is_started_again_and_nothing_is_lost(name: str) -> None:
    stage = Stage(config(max_staleness=2), World())
    stage.worker(name).deaths = 3
    stage.run()
    assert_whole(stage)
    assert sum(name in note for note in stage.notes.notes) >= 3
    assert not stage.notes.deaths
    kept = stage.notes.checkpoints[-1][2]
    assert kept.snapshot.version == kept.optimizer.steps == 20
    assert (kept.snapshot.incarnation > 0) == (name == "Learner(0)")


def test_a_learner_that_dies_before_its_optimizer_state_is_here_repeats_the_update_under_the_published_router() -> None:
    stage = Stage(config(max_staleness=1), World())
    stage.worker("Learner(0)").die_at["moments"] = 3
    stage.run()
    assert_whole(stage)
    assert stage.recovery.restarts["Learner"] == 3
    kept = stage.notes.checkpoints[-1][2]
    assert kept.snapshot.version == kept.optimizer.steps == 20
    assert kept.snapshot.incarnation == 3


def test_groups_that_are_lost_run_again_and_so_does_what_needed_a_lost_router() -> None:
    stage = Stage(config(max_staleness=1), World())
    stage.worker("Learner(0)").losses["update"] = 2
    stage.worker("Rollout(0)").losses["sample"] = 5
    published = []
    put = stage.fleet.backend.put
    stage.fleet.backend.put = lambda value: published.append(value) or put(value)  # type: ignore[method-assign]
    stage.run()
    assert_whole(stage)
    assert not stage.notes.deaths
    assert any("prompts run again" in note for note in stage.notes.notes)
    assert sum(isinstance(value, RouterSnapshot) for value in published) >= 7


def test_an_optimizer_state_that_is_lost_with_its_groups_is_replaced_by_the_one_before() -> None:
    stage = Stage(config(max_staleness=1), World())
    learner = stage.worker("Learner(0)")
    whole = stage.world.moments

    def lost_at_five() -> OptimizerState:
        if stage.world.version == 5 and not learner.losses["done"]:
            learner.losses["done"], learner.losses["update"] = 1, 1
            raise Loss("the optimizer's state")
        return whole()

    stage.world.moments = lost_at_five  # type: ignore[method-assign]
    stage.run()
    assert [record["step"] for record in stage.notes.steps] == list(range(1, 21))
    assert stage.admission.trained == set(range(120))
    assert "the optimizer goes on from its state one step before" in stage.notes.notes


def test_a_learner_whose_code_raises_stops_the_run_with_the_place_and_is_not_started_again() -> None:
    stage = Stage(config(), World())
    stage.worker("Learner(0)").raises["update"] = ArithmeticError("a gradient that is not a number")
    with pytest.raises(RunError, match="not a number") as stopped:
        stage.run()
    assert "in line 7 of the learner" in str(stopped.value)
    assert not stage.recovery.restarts
    assert stage.notes.checkpoints[-1][0] == 0


def test_a_worker_that_hangs_is_named_with_its_stack_and_started_again() -> None:
    stage = Stage(config(max_staleness=1, ray={"deadline_s": 0.5}), World())
    stage.worker("Rollout(1)").hangs = 1
    stage.run()
    assert_whole(stage)
    note = next(note for note in stage.notes.notes if "stuck" in note)
    assert note.startswith("Rollout(1) stuck") and "0.5 s" in note and "stack of Rollout(1)" in note


@pytest.mark.parametrize("per_call", [1, 2, 6])
def test_one_hang_restarts_a_worker_once_however_many_calls_wait_for_it(per_call: int) -> None:
    """Their deadlines are milliseconds apart, and looking for a stack takes longer than that."""
    settings = {"max_staleness": 1, "ray": {"deadline_s": 0.3}, "pipeline": {"prompts_per_call": per_call}}
    stage = Stage(config(**settings), World())
    stage.fleet.backend.stack = lambda handle: time.sleep(0.2) or f"stack of {handle.name}"  # type: ignore[method-assign, func-returns-value]
    stage.worker("Expert(0)").hangs = 1
    stage.run()
    assert_whole(stage)
    assert stage.recovery.restarts == {"Expert(0)": 1}


def test_finished_groups_whose_expert_dies_before_their_features_are_made_again_run_again() -> None:
    stage = Stage(config(max_staleness=1), World())
    a = stage.admission
    a.restore({"version": 0, "next_ordinal": 6, "retry": [], "finished": {str(n): [0, 1] for n in range(6)},
               "trained": [], "filtered": [], "dead": []})  # fmt: skip
    stage.worker("Expert(0)").deaths = 1

    async def run() -> None:
        stage.driver.resume_with([finished_group(n) for n in range(6)])
        await asyncio.wait_for(stage.driver.run(), 20)

    asyncio.run(run())
    assert_whole(stage)
    assert not stage.recovery.restarts["Learner"], "the learner was not to blame"


def test_a_prompt_is_not_blamed_for_features_made_ahead_by_an_expert_that_died() -> None:
    stage = Stage(config(pipeline={"prompts_per_call": 1, "attempts": 1}, learner={"groups": 1}), World())
    stage.worker("Expert(0)").deaths = 1
    stage.run()
    assert_whole(stage, groups=1)
    assert not stage.notes.deaths


def test_a_death_while_a_checkpoint_is_written_or_a_validation_runs_ends_nothing() -> None:
    stage = Stage(config(max_staleness=1), World())
    looked = Counter[int]()

    async def validate(step: int, router: Any) -> None:
        looked[step] += 1
        if step == 3 and looked[step] == 1:
            raise Death(stage.worker("Rollout(0)"), 0)

    stage.notes.validate = validate  # type: ignore[method-assign]
    groups, lost = stage.driver._groups, []

    async def lose_one(ordinals: Any, waves: Any) -> Any:
        if ordinals and not lost:
            lost.extend(ordinals)
            raise Loss("finished groups")
        return await groups([], [])

    stage.driver._groups = lose_one  # type: ignore[method-assign]
    stage.run()
    assert_whole(stage)
    assert looked[3] == 2 and stage.recovery.restarts["Rollout(0)"] == 1
    assert [step for step, *_ in stage.notes.checkpoints] == [4, 8, 12, 16, 20]
    assert lost


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_checkpoint_after_a_failure_knows_no_step_that_the_log_does_not(staleness: int) -> None:
    for failing in range(1, 12):
        stage = Stage(config(max_staleness=staleness, pipeline={"prompts_per_call": 1}), World(seed=failing))
        observe, seen = stage.driver.verifiers.observe, []

        def fail(groups: Any, observe: Any = observe, seen: list[Any] = seen, failing: int = failing) -> None:
            seen.append(groups)
            if len(seen) == 7 * failing:
                raise RunError("enough")
            observe(groups)

        stage.driver.verifiers.observe = fail  # type: ignore[method-assign]
        with pytest.raises(RunError, match="enough"):
            stage.run()
        assert [record["step"] for record in stage.notes.steps] == list(range(1, stage.notes.checkpoints[-1][0] + 1))


@pytest.mark.parametrize("name", ["Rollout(1)", "Learner(0)"])
def test_a_wait_that_grows_long_is_spoken_of_before_the_deadline(name: str) -> None:
    stage = Stage(config(max_staleness=1, ray={"deadline_s": 1.0, "warning_s": 0.2}), World())
    stage.worker(name).hangs = 1
    stage.run()
    assert_whole(stage)
    early, late = (
        next(i for i, note in enumerate(stage.notes.notes) if word in note) for word in ("waits for", "stuck")
    )
    assert early < late
    note = stage.notes.notes[early]
    assert note.startswith("prompts " if name == "Rollout(1)" else "update 1:")
    assert f": 0 s already; it waits for {name} (the deadline is 1 s); its stack:" in note


@pytest.mark.parametrize("name", ["Expert(0)", "Rollout(2)"])
def test_a_worker_that_hangs_outside_training_is_found_by_its_silence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation's calls go through many workers: whoever gives no sign of life is named and started again."""
    monkeypatch.setattr(watchdog, "ALIVE_S", 0.2)
    stage = Stage(config(max_staleness=0, ray={"deadline_s": 1.0, "warning_s": 0.2}), World())
    looked: list[int] = []

    async def validate(step: int, router: Any) -> None:
        if step == 3:
            looked.append(step)
            stage.worker(name).hangs = int(len(looked) == 1)
            features = [made.reference for made in stage.fleet.encode([])]
            rollouts = [worker.call("sample", [], None, router, *features) for worker in stage.fleet.rollouts]
            await stage.fleet.get_all(rollouts, "evaluation")

    stage.notes.validate = validate  # type: ignore[method-assign]
    stage.run()
    assert len(looked) == 2
    assert set(stage.recovery.restarts) == {name}
    early, late = (note for note in stage.notes.notes if name in note)
    assert f"0 s already; it waits for {name} (the deadline is 1 s); its stack" in early
    assert late.startswith(f"{name} stuck: ") and "gave no answer within 1 s" in late


def test_a_poisonous_prompt_ends_as_a_dead_letter_and_spares_the_others() -> None:
    stage = Stage(config(max_staleness=1, pipeline={"max_restarts": 50}), World())
    for index in range(3):
        stage.worker(f"Rollout({index})").die_on = {7}
    stage.run()
    assert_whole(stage)
    assert [ordinal for ordinal, _ in stage.notes.deaths] == [7]
    assert stage.notes.deaths[0][1].worker.startswith("Rollout(")
    assert stage.admission.dead == {7}


@pytest.mark.parametrize("name", ["Expert(0)", "Learner(0)"])
def test_a_worker_that_keeps_dying_stops_the_run_with_its_name_log_and_a_checkpoint(name: str) -> None:
    stage = Stage(config(pipeline={"max_restarts": 2, "attempts": 100}), World())
    stage.worker(name).deaths = 10**6
    with pytest.raises(RunError, match=r"failed 3 times in a row") as stopped:
        stage.run()
    assert name in str(stopped.value) and f"log of {name}" in str(stopped.value)
    assert stage.notes.checkpoints[-1][0] == stage.admission.version


def test_groups_without_signal_end_as_filtered_and_are_replaced() -> None:
    stage = Stage(config(max_staleness=1, algorithm={"kind": "dapo"}), World(no_signal=0.5))
    stage.run()
    assert_whole(stage)
    assert len(stage.admission.filtered) > 20
    stream: Any = stage.driver.stream
    assert sorted(stream.noted) == sorted(stage.admission.filtered | stage.admission.trained)
    assert len(stream.advances) == 20
    assert sum(record["groups/filtered"] for record in stage.notes.steps) <= len(stage.admission.filtered)
    dropped = [record["groups/filtered"] for record in stage.notes.steps]
    trained = stage.config.learner.groups
    assert any(dropped)
    sampled = 2 * len(stage.admission.filtered | stage.admission.trained)
    assert stage.driver.samples == sampled, "what was dropped was sampled as well"
    assert [record["groups/no_signal"] for record in stage.notes.steps] == [n / (n + trained) for n in dropped]


def test_measuring_on_the_way_is_no_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, spent = Stage(config(), World()), []

    async def validate(step: int, router: object) -> None:
        spent.append(1000.0)

    clock = time.perf_counter
    monkeypatch.setattr("cluster.run.driver.time.perf_counter", lambda: clock() + sum(spent))
    stage.notes.validate = validate  # type: ignore[method-assign]
    stage.run()
    assert len(spent) == 20 and stage.driver.elapsed_s < 1000


def test_a_full_disk_ends_the_run_with_the_cause() -> None:
    stage = Stage(config(), World())

    def full(record: object) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    stage.notes.step = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match=r"No space left on device: 'metrics\.jsonl'"):
        stage.run()
