"""Entries of every Reasoning Gym data set, their gold answers in many spellings, and wrong answers to them."""

from __future__ import annotations

# What takes seconds an entry by default is generated smaller: what is tested is the scoring.
SMALLER: dict[str, dict] = {
    "knight_swap": {"impossible_ratio": 1.0},
    "futoshiki": {"max_board_size": 5, "max_difficulty": 1},
    "intermediate_integration": {"problem_type_weights": [1, 0, 0, 0, 0, 0, 0, 0]},
    "puzzle24": {"max_value": 6},
    "sokoban": {"max_w": 6, "max_h": 6, "max_boxes": 4},
    "zebra_puzzles": {"num_people": 3, "num_characteristics": 3},
}
