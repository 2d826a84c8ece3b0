"""States for experts that are away: kept, read back, and refused when they belong to another router."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experts.standins import STAND_INS, read_stand_ins, write_stand_ins
from experts.state import RouterError

STATES = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.arange(10, dtype=np.float32)[None, ::2]}


@pytest.mark.parametrize("states", [STATES, {}])
def test_what_is_written_is_read_for_the_same_router_only(tmp_path: Path, states: dict[str, np.ndarray]) -> None:
    assert read_stand_ins(tmp_path, "mine") is None
    write_stand_ins(tmp_path, "mine", states)
    found = read_stand_ins(tmp_path, "mine")
    assert found is not None and found.keys() == states.keys()
    for name, state in states.items():
        assert np.array_equal(found[name], state) and found[name].dtype == np.float32
    assert read_stand_ins(tmp_path, "another") is None
    assert [path.name for path in tmp_path.iterdir()] == [STAND_INS]


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    write_stand_ins(tmp_path, "mine", STATES)
    path = tmp_path / STAND_INS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RouterError, match=rf"{STAND_INS} is damaged .*: copy it again, or delete it"):
        read_stand_ins(tmp_path, "mine")
