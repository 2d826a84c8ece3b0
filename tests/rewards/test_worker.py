"""Verifiers that hang, fail or die cost their own completion only."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from rewards.config import RewardsConfig
from rewards.verifiers import LengthTerm, WeightedSum
from rewards.verify import ExactInteger, RewardsError
from rewards.worker import RewardWorker
from rollout.types import Completion, Draws, FinishReason, Group, RewardStatus, RouterStamp, Sampling, Score
from tests.rewards.verifiers import Knowing, Obedient, Unloadable, a_prompt

OK, TIMEOUT, ERROR = RewardStatus.OK, RewardStatus.TIMEOUT, RewardStatus.ERROR
LIMIT_S = 1.0
KEEP_40, KEEP_80 = "keep 1048576 40", "keep 1048576 80"
KEEP_ALL = "keep 400 10000000"  # until not even an error message finds room


def a_group(*texts: str, task: str = "task", ordinal: int = 0, answer: str = "2") -> Group:
    nothing = np.zeros(0, np.int64)
    return Group(
        prompt=a_prompt(task, answer=answer, ordinal=ordinal),
        prompt_tokens=nothing,
        completions=tuple(
            Completion(tokens=nothing, logprobs=np.zeros(0, np.float32), text=text, finish=FinishReason.STOP)
            for text in texts
        ),
        sampling=Sampling(temperature=1.0, max_new_tokens=4, samples=len(texts)),
        router=RouterStamp(version=0, incarnation=0, checksum=""),
        draws=Draws(expert_mask=np.ones(1, bool)),
        prefix_hash="",
        prefix_sketch=np.zeros(0, np.float32),
        prefix_rms_ratio=0.0,
        feature_keys=(),
        attention=np.zeros((1, 1), np.float32),
    )


@pytest.fixture(scope="module")
def worker() -> Iterator[RewardWorker]:
    config = RewardsConfig(binary_at=None, timeout_s=LIMIT_S, memory_mb=256)
    made = RewardWorker({"task": Obedient(), "exact": ExactInteger()}, config, index=3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def patient() -> Iterator[RewardWorker]:
    """It waits for whoever eats slowly."""
    config = RewardsConfig(binary_at=None, timeout_s=60.0, memory_mb=64)
    made = RewardWorker({"task": Obedient(), "exact": ExactInteger()}, config)
    yield made
    made.close()


def verdicts(worker: RewardWorker, *texts: str) -> tuple[Score, ...]:
    return worker.score_groups([a_group(*texts)])[0].scores


def test_groups_come_back_in_order_with_a_score_per_completion(worker: RewardWorker) -> None:
    groups = [a_group("0.5", "1", ordinal=4), a_group("2", " 2\n", "3", task="exact", ordinal=2), a_group(ordinal=9)]
    scored = worker.score_groups(groups)
    assert [group.ordinal for group in scored] == [4, 2, 9]
    assert [[score.reward for score in group.scores] for group in scored] == [[0.5, 1.0], [1.0, 1.0, 0.0], []]
    assert all(score.status is OK and not score.reason for group in scored for score in group.scores)
    assert worker.score_groups([]) == []


def test_the_actor_s_call_gives_what_the_inline_call_gives(worker: RewardWorker) -> None:
    groups = [a_group("0.5", "none")]
    scores = asyncio.run(worker.score(groups))[0].scores
    assert scores == worker.score_groups(groups)[0].scores


def test_a_slow_call_does_not_hold_up_another(worker: RewardWorker) -> None:
    async def both() -> tuple[bool, list[Score]]:
        slow = asyncio.ensure_future(worker.score([a_group("sleep 30")]))
        await asyncio.sleep(0)
        quick = await worker.score([a_group("0.5")])
        waiting = not slow.done()
        return waiting, [*quick[0].scores, *(await slow)[0].scores]

    # A second process needs longer to start than the first call's limit: only from then on there are two.
    asyncio.run(both())
    still_waiting, (quick, slow) = asyncio.run(both())
    assert still_waiting
    assert (quick.reward, quick.status, slow.status) == (0.5, OK, TIMEOUT)
    assert len(worker.describe()["pids"]) == 2


def test_a_completion_that_takes_too_long_is_masked_and_the_rest_go_on(worker: RewardWorker) -> None:
    before = worker.describe()
    scores = verdicts(worker, "1", "regex", "0.25", "sleep 30", "0.5")
    assert [score.status for score in scores] == [OK, TIMEOUT, OK, TIMEOUT, OK]
    assert [score.reward for score in scores if score.status is OK] == [1.0, 0.25, 0.5]
    assert "no verdict within 1 s" in scores[1].reason
    after = worker.describe()
    assert after["restarts"] - before["restarts"] == 2
    assert after["pids"] != before["pids"]
    assert after["masked"]["task"] - before["masked"]["task"] == 2
    assert after["scored"]["task"] - before["scored"]["task"] == 5


def test_a_verifier_that_is_late_three_times_in_a_row_is_not_asked_again_in_that_call(worker: RewardWorker) -> None:
    before = worker.describe()["restarts"]
    scores = verdicts(worker, "sleep 30", "0.5", *[f"sleep {n}" for n in range(31, 35)], "0.25")
    assert [score.status for score in scores] == [TIMEOUT, OK, *[TIMEOUT] * 5]
    assert ["not asked again" in score.reason for score in scores] == [False] * 5 + [True] * 2
    assert worker.describe()["restarts"] - before == 4
    assert [score.status for score in verdicts(worker, "0.25")] == [OK]


def test_the_limit_is_for_one_completion_not_for_the_batch(worker: RewardWorker) -> None:
    scores = verdicts(worker, *[f"sleep 0.3{n}" for n in range(4)])
    assert [score.status for score in scores] == [OK] * 4


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("raise out of luck", "LookupError: out of luck"),
        ("nan", "returned nan, not a finite number"),
        ("inf", "returned inf"),
        ("text", "returned '1'"),
        ("none", "returned None"),
        ("huge", "OverflowError"),
        ("exit", "SystemExit: 3"),
        ("eat 100000", "MemoryError"),
        ("eat 300", "MemoryError"),
        ("die 7", "the verifier ended its process (exit code 7)"),
        ("die 0", "the verifier ended its process (exit code 0)"),
    ],
)
def test_a_verifier_that_fails_is_an_error_with_its_reason(worker: RewardWorker, command: str, reason: str) -> None:
    scores = verdicts(worker, "1", command, "0.5")
    assert [score.status for score in scores] == [OK, ERROR, OK]
    assert [scores[0].reward, scores[2].reward] == [1.0, 0.5]
    assert reason in scores[1].reason


@pytest.mark.parametrize("command", [KEEP_80, KEEP_ALL])
def test_a_verifier_that_keeps_what_it_eats_costs_its_own_completion_only(patient: RewardWorker, command: str) -> None:
    before = patient.describe()["restarts"]
    scored = patient.score_groups([a_group("0.5", command, "eat 50"), a_group("2", task="exact", ordinal=1)])
    statuses = [score.status for group in scored for score in group.scores]
    assert statuses == [OK, ERROR, OK, OK]
    assert scored[0].scores[1].reason.startswith("MemoryError")
    assert patient.describe()["restarts"] > before


def test_nobody_is_blamed_for_memory_that_an_answer_before_it_has_kept(patient: RewardWorker) -> None:
    assert [score.status for score in verdicts(patient, KEEP_40, "1", "eat 50", KEEP_40)] == [OK] * 4
    assert [score.status for score in verdicts(patient, "eat 50")] == [OK], "the first of its call"


def test_a_failure_first_and_last_in_a_batch(worker: RewardWorker) -> None:
    assert [score.status for score in verdicts(worker, "die 1", "1", "sleep 30")] == [ERROR, OK, TIMEOUT]
    assert [score.status for score in verdicts(worker, "1")] == [OK]


def test_a_process_that_died_between_batches_costs_no_completion() -> None:
    worker = RewardWorker({"task": Obedient()}, RewardsConfig(processes=1, timeout_s=LIMIT_S))
    os.kill(worker.describe()["pids"][0], 9)
    scores = verdicts(worker, "1", "0.5")
    worker.close()
    assert [score.status for score in scores] == [OK, OK]


def test_scores_are_mapped_to_zero_and_one_at_the_threshold() -> None:
    worker = RewardWorker({"task": Obedient()}, RewardsConfig(binary_at=0.5, timeout_s=LIMIT_S))
    scores = verdicts(worker, "0.49", "0.5", "1", "none")
    worker.close()
    assert [score.reward for score in scores[:3]] == [0.0, 1.0, 1.0]
    assert scores[3].status is ERROR


def test_right_is_exact_where_the_score_itself_is_the_reward() -> None:
    with closing(RewardWorker({"task": Obedient()}, RewardsConfig(binary_at=None))) as worker:
        shaped = verdicts(worker, "0.99", "0.9999999999", "1")
    assert [score.reward for score in shaped] == [0.99, 0.9999999999, 1.0]
    assert [score.right for score in shaped] == [0.0, 1.0, 1.0]
    with closing(RewardWorker({"task": Obedient()}, RewardsConfig())) as worker:
        assert [score.reward for score in verdicts(worker, "0.99", "0.9999999999", "1")] == [0.0, 1.0, 1.0]


def test_an_unreadable_answer_is_wrong_and_counted() -> None:
    sums = WeightedSum(Obedient(), ((1.0, Obedient()), (0.5, LengthTerm(1000))))
    with closing(RewardWorker({"task": Obedient(), "sum": sums}, RewardsConfig())) as worker:
        scores = [
            *verdicts(worker, "unreadable what is this", "1"),
            *worker.score_groups([a_group("unreadable", task="sum")])[0].scores,
        ]
        counts = worker.describe()
    assert [score.status for score in scores] == [OK] * 3
    assert [(score.reward, score.right, score.unreadable) for score in scores] == [
        (0, 0, True),
        (1, 1, False),
        (0.5, 0, True),
    ]
    assert scores[0].reason == "Unreadable: what is this"
    assert counts["unreadable"] == {"task": 1, "sum": 1} and counts["masked"] == {"task": 0, "sum": 0}
    assert counts["restarts"] == 0, "nothing unexpected has happened"


def test_a_failure_to_read_is_the_answer_s_if_a_right_answer_can_be_read() -> None:
    verifiers = {"task": Obedient(), "known": Knowing("1"), "broken": Knowing("key lost"), "unknown": Knowing(None)}
    with closing(RewardWorker(verifiers, RewardsConfig(timeout_s=LIMIT_S))) as worker:
        tried = {
            name: worker.score_groups([a_group("key lost", "raise oops", "1", task=name)])[0].scores
            for name in verifiers
        }
    statuses = {name: [score.status for score in scores] for name, scores in tried.items()}
    # Only a verifier that knows a right answer is believed: the fault may be its own.
    assert statuses == {
        "task": [ERROR, ERROR, OK],
        "known": [OK, ERROR, OK],
        "broken": [ERROR, ERROR, OK],
        "unknown": [ERROR, ERROR, OK],
    }
    assert [score.unreadable for score in tried["known"]] == [True, False, False]
    assert tried["broken"][0].reason == "KeyError: 'lost', and no right answer is known that it reads"


def test_right_answers_are_tried_where_no_answer_has_been() -> None:
    """The answer in doubt has made every answer right in its own process; in a fresh one the right one is wrong."""
    with closing(RewardWorker({"known": Knowing("0.5")}, RewardsConfig())) as worker:
        (score,) = worker.score_groups([a_group("spoil", task="known")])[0].scores
    assert score.status is ERROR


def test_a_process_is_replaced_after_so_many_completions_and_after_a_failure() -> None:
    with closing(RewardWorker({"task": Obedient()}, RewardsConfig(reuse=3, binary_at=None))) as worker:
        assert [s.reward for s in verdicts(worker, *[f"0.{n}" for n in range(1, 8)])] == [n / 10 for n in range(1, 8)]
        assert worker.describe()["restarts"] == 2
        assert [s.status for s in verdicts(worker, "raise oops", "1")] == [ERROR, OK]
        assert worker.describe()["restarts"] == 3


def test_the_scoring_process_imports_no_torch(worker: RewardWorker) -> None:
    assert [s.reward for s in verdicts(worker, "imported torch", "imported ray", "imported rewards.child")] == [0, 0, 1]


def test_a_time_out_takes_along_what_the_verifier_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with closing(RewardWorker({"task": Obedient()}, RewardsConfig(timeout_s=LIMIT_S, jail="off"))) as worker:
        assert verdicts(worker, f"child {note}")[0].status is TIMEOUT
    assert gone(int(note.read_text()))


def test_the_scoring_process_ends_with_its_parent_even_inside_a_verifier() -> None:
    script = (
        "import os, threading, time\n"
        "from tests.rewards.test_worker import *\n"
        "worker = RewardWorker({'task': Obedient()}, RewardsConfig(timeout_s=60))\n"
        "print(worker.describe()['pids'][0], flush=True)\n"
        "threading.Thread(target=verdicts, args=(worker, 'regex'), daemon=True).start()\n"
        "time.sleep(0.3); os._exit(1)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert gone(int(done.stdout))


def test_a_closed_worker_leaves_no_process_and_closes_twice() -> None:
    worker = RewardWorker({"task": Obedient()}, RewardsConfig())
    pid = worker.describe()["pids"][0]
    worker.close()
    worker.close()
    assert not Path(f"/proc/{pid}").exists()  # ended and reaped, no zombie


def test_many_cheap_completions_come_back_in_order(worker: RewardWorker) -> None:
    groups = [a_group(*[f"0.{m}" for m in range(8)], ordinal=n) for n in range(32)]
    scored = worker.score_groups(groups)
    assert [[score.reward for score in group.scores] for group in scored] == [[n / 10 for n in range(8)]] * 32


def test_verifiers_that_cannot_be_loaded_and_unknown_tasks_are_refused(worker: RewardWorker) -> None:
    with pytest.raises(RewardsError, match="did not start: FileNotFoundError: the model file is missing"):
        RewardWorker({"task": Unloadable()}, RewardsConfig())
    with pytest.raises(RewardsError, match="no verifier for task 'other'"):
        worker.score_groups([a_group("1", task="other")])
    with pytest.raises(RewardsError, match="cannot be pickled"):
        RewardWorker({"task": type("Local", (Obedient,), {})()}, RewardsConfig())


def test_a_worker_is_named_by_its_index(worker: RewardWorker) -> None:
    assert repr(worker) == worker.describe()["name"] == "Reward(3)"


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process has ended, or does so soon."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # ended; whoever inherited it has not looked yet
            return True
        time.sleep(0.05)
    return False


def test_equal_answers_to_a_prompt_are_judged_once(worker: RewardWorker) -> None:
    groups = [a_group("0.5", "sleep 30", "0.5", "sleep 30"), a_group("sleep 30", ordinal=1)]
    before = worker.describe()["restarts"]
    scored = worker.score_groups(groups)
    assert [[score.status for score in group.scores] for group in scored] == [[OK, TIMEOUT, OK, TIMEOUT], [TIMEOUT]]
    assert worker.describe()["restarts"] - before == 2
