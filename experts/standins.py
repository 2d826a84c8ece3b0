"""States to put in the place of experts that are away, so that their absence costs nothing where they are not needed.

A router that has always seen every expert does not know what to make of a missing one, but it has learned whom not to
hear: with the states of a prompt that the missing expert has nothing to say about, it answers as before.  Which
prompt's states do best is found by trying some on validation prompts (`cluster.run.substitution`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from experts.expert import Encoded
from experts.state import RouterError

STAND_INS = "stand_ins.safetensors"
States = Mapping[str, np.ndarray]


def write_stand_ins(folder: Path, router: str, states: States) -> None:
    """Writes `stand_ins.safetensors`, whole or not at all.

    router: the checksum of the one that they were found for.
    states: (tokens, width) float32 by expert.
    """
    partial = folder / f".{STAND_INS}.partial"
    contiguous = {name: np.ascontiguousarray(state) for name, state in states.items()}
    partial.write_bytes(save(contiguous, {"router": router}))
    partial.replace(folder / STAND_INS)


def read_stand_ins(folder: Path, router: str) -> States | None:
    """Those that were found for a router; None where none were looked for, or for another router.

    Raises:
        RouterError: when the file is damaged.
    """
    path = folder / STAND_INS
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            found = (file.metadata() or {}).get("router")
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise RouterError(f"{path} is damaged ({error}): copy it again, or delete it") from error
    return states if found == router else None


def stood_in(encoded: Encoded, state: np.ndarray) -> Encoded:
    """An expert's part with the same state for every prompt."""
    return replace(encoded, features=(state,) * len(encoded.features))
