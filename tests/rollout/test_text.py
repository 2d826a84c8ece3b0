"""Experts' answers in the policy's prompt."""

from __future__ import annotations

import pytest

from experts.config import TextConfig
from rollout.text import unknown_fields, with_answers

SYSTEM, ASKED = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is {a} + 1?"}


def test_names_answers_and_the_prompt_are_filled_in_once() -> None:
    template = "{b-2} and {a}; all: {answers}; {prompt} {c}"
    found = with_answers(template, [SYSTEM, ASKED], {"a": "3 {prompt}", "b-2": "4"})  # type: ignore[list-item]
    assert found[0] == SYSTEM
    assert found[1]["content"] == "4 and 3 {prompt}; all: a: 3 {prompt}\nb-2: 4; What is {a} + 1? {c}"
    assert found[1]["role"] == "user" and ASKED["content"] == "What is {a} + 1?"


def test_a_template_without_the_prompt_is_refused_and_unknown_names_are_found() -> None:
    with pytest.raises(ValueError, match="the policy would not see the question"):
        TextConfig(template="{answers}")
    assert unknown_fields("{one} {two} {answers} {prompt} {}", ["one"]) == ["two"]
