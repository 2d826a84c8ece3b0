"""Entries are a function of the configuration: no process's hash seed, clock, place or past changes them."""

from __future__ import annotations

import contextvars
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum

from rewards.config import DataConfig
from rewards.generation import Generator, _shared, one_generator
from rewards.sources import build_tasks
from rewards.stream import PromptStream
from rewards.verify import RewardsError
from tests.rewards.conftest import data_of
from tests.rewards.test_every_dataset import NEEDS_OTHERS, SMALLER

ROOT = Path(__file__).parents[2]
# The first four go through sets.
TELLING = (
    "ransom_note", "isomorphic_strings", "polynomial_multiplication", "word_ladder", "decimal_chain_sum",
    "list_functions", "pool_matrix",
)  # fmt: skip
SHOW = """
import sys
import time
from rewards.config import DataConfig
from tests.rewards.test_generation import seen
print(seen(DataConfig.model_validate_json(sys.argv[1])))
"""


def seen(data: DataConfig) -> str:
    """Digests of every task's pools, and the first prompts of the stream."""
    stream = PromptStream(build_tasks(data), data)
    tasks = {name: known["pools"] for name, known in sorted(stream.state()["tasks"].items())}
    return json.dumps([tasks, [stream.prompt(n).key for n in range(4 * len(tasks))]])


def seen_under(hash_seed: int, data: DataConfig, **environment: str) -> list[Any]:
    """The same in another process."""
    environment |= {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SHOW, data.model_dump_json()]
    return json.loads(subprocess.check_output(command, env=os.environ | environment, timeout=250))


def some(*names: str, size: int = 12) -> list[dict[str, Any]]:
    """A task of each data set."""
    return [{"name": name, "dataset": name, "size": size, "config": SMALLER.get(name, {})} for name in names]


def test_another_hash_seed_and_other_tasks_before_change_no_prompt() -> None:
    # Rounds what is computed after it in its process to six digits.
    rounding = {"name": "rounding", "dataset": "decimal_arithmetic", "size": 12, "config": {"precision": 6}}
    tasks = [rounding, *some(*TELLING), {"name": "level", "dataset": "decimal_chain_sum", "size": 12, "level": 1}]
    tasks += [{"name": "moving", "dataset": "word_ladder", "size": 40, "curriculum": {"levels": [0, 1]}}]
    mine = json.loads(seen(data_of(*tasks)))
    # In the other order: what came before in one process comes after in the other.
    assert seen_under(1, data_of(*reversed(tasks)))[0] == mine[0]


@pytest.mark.slow
def test_every_data_set_s_pools_and_stream_are_equal_under_three_hash_seeds() -> None:
    tasks = some(*sorted(set(DATASETS) - NEEDS_OTHERS), size=20)
    for name in sorted(set(DATASETS) - NEEDS_OTHERS - {"knight_swap", "modulo_grid"}):  # no level of theirs is possible
        if has_curriculum(name):
            highest = max(len(attribute.levels) for attribute in create_curriculum(name).attributes.values()) - 1
            level = {"level": min(1, highest), "size": 12}
            tasks += [task | level | {"name": f"{name} by level"} for task in some(name)]
    whole = data_of(*tasks)
    first = seen_under(1, whole)
    assert len(first[0]) > 200
    assert seen_under(2, whole, TZ="Asia/Tokyo", LC_ALL="C") == first
    assert seen_under(3, data_of(*reversed(tasks)))[0] == first[0]


def test_a_process_that_ends_is_one_line_and_the_next_call_has_another() -> None:
    (task,) = data_of(*some("chain_sum")).tasks
    generator = Generator()
    process = generator._start()
    process.kill()
    process.wait()
    with pytest.raises(RewardsError, match=r"task 'chain_sum': the process .* exit code -9: .* make size smaller") as e:
        generator.generate(task, 1)
    assert "\n" not in str(e.value)
    assert len(generator.generate(task, 1)) == 12
    generator.close()


def test_the_process_ends_with_its_owner_while_it_makes_entries() -> None:
    script = (
        "import os, threading, time\n"
        "from rewards.config import TaskConfig\n"
        "from rewards.generation import Generator\n"
        "generator = Generator()\n"
        "task = TaskConfig(name='t', dataset='chain_sum', size=10**9)\n"
        "print(generator._start().pid, flush=True)\n"
        "threading.Thread(target=generator.generate, args=(task, 1), daemon=True).start()\n"
        "time.sleep(3); os._exit(1)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    group = int(done.stdout)
    deadline = time.monotonic() + 30
    while any(_group(pid) == group for pid in psutil.pids()):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def test_all_of_a_configuration_is_made_in_one_process_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    start = Generator._start
    monkeypatch.setattr(Generator, "_start", lambda self: started.append(start(self)) or started[-1])

    def build() -> None:
        _shared.set(None)  # the one that these tests share
        with one_generator() as outer:
            build_tasks(data_of(*some("chain_sum", "leg_counting")))
            with one_generator() as inner:
                assert inner is outer and started[0].poll() is None

    contextvars.copy_context().run(build)
    assert len(started) == 1 and started[0].returncode == -9
