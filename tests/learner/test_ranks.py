"""A learner of one rank opens no port that another machine could reach."""

from __future__ import annotations

import subprocess
import sys

LONE = """
import psutil
from learner.engine import Rendezvous, init_ranks
import torch
init_ranks(Rendezvous(host="192.0.2.1"))
one = torch.ones(3)
torch.distributed.all_reduce(one)
assert one.tolist() == [1.0] * 3
print(*{c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN})
"""


def test_a_rank_alone_listens_on_loopback_only() -> None:
    ended = subprocess.run([sys.executable, "-c", LONE], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert set(ended.stdout.splitlines()[-1].split()) <= {"127.0.0.1", "::1"}
