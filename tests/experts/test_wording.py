"""An expert reads a prompt in its own words, as far as it reads, and is another one when these change."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.chat import PromptStyle, Wording
from experts.config import CacheConfig, ExpertConfig
from experts.expert import Expert, whole
from experts.loading import load_frozen, stored_sha256, tokenizer_text
from tests.models import make

SHOTS = PromptStyle(template="Q: 1 + 1\nA: 2\nQ: {question}\nA:")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{{ strftime_now('%d %B %Y') }}{% if quiet %} quiet{% endif %}:"
)


def asked(question: str, style: PromptStyle = SHOTS) -> tuple[dict[str, str], ...]:
    """As the run's template makes it, behind a system message."""
    content = style.template.replace("{question}", question)
    return ({"role": "system", "content": "Think."}, {"role": "user", "content": content})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model."""
    return make(tmp_path_factory.mktemp("models") / "it", "llama", width=24)


def expert(folder: Path, style: PromptStyle = SHOTS, disk: Path | None = None, **settings: Any) -> Expert:
    """With settings of its own."""
    config = ExpertConfig.model_validate({"name": "it", "model": str(folder)} | settings)
    return Expert(config, str(folder), CacheConfig(disk=None if disk is None else str(disk)), style=style)


def test_under_few_shots_it_answers_and_thinks_as_on_the_bare_question(folder: Path) -> None:
    bare = [({"role": "user", "content": f"{n} + 4 ="},) for n in range(3)]
    shots = [asked(f"{n} + 4") for n in range(3)]
    plain, own = expert(folder), expert(folder, template="{question} =", system="")
    assert own.answer(shots, 5) == plain.answer(bare, 5) != plain.answer(shots, 5)
    assert own.answers(shots, [0, 1, 2], 5).answers == plain.answers(bare, [0, 1, 2], 5).answers
    for one, other in zip(own.encode(shots).features, plain.encode(bare).features, strict=True):
        assert np.array_equal(one, other)
    both = expert(folder, template="{prompt} ({question})", system="Be brief.").read(asked("3 + 4"))
    text = f"Be brief.\n{asked('3 + 4')[1]['content']} (3 + 4)"
    assert both.tokens == plain.read([{"role": "user", "content": text}]).tokens


def test_of_a_composed_prompt_it_answers_its_own_part_as_if_it_were_alone(folder: Path) -> None:
    style = PromptStyle(wordings=(Wording("{part1}? {part2}? The sum?", "{part1}? {part2}?", ("mine", "another's")),))
    composed = [({"role": "user", "content": f"{n} + 4? a cow? The sum?"},) for n in range(3)]
    alone = [({"role": "user", "content": f"{n} + 4 ="},) for n in range(3)]
    plain, own = expert(folder, style), expert(folder, style, template="{question} =", parts=["mine"])
    assert own.answer(composed, 5) == plain.answer(alone, 5) != plain.answer(composed, 5)
    for one, other in zip(own.encode(composed).features, plain.encode(alone).features, strict=True):
        assert np.array_equal(one, other)
    whole_prompt = expert(folder, style, template="{question} =")
    assert own.fingerprint != whole_prompt.fingerprint


def test_what_a_configuration_without_the_new_keys_was_it_is_still(folder: Path) -> None:
    plain, frozen = expert(folder), load_frozen(str(folder))
    model = hashlib.sha256(
        (stored_sha256(str(folder)) + tokenizer_text(frozen.tokenizer) + str(frozen.tokenizer.chat_template)).encode()
    ).hexdigest()
    assert frozen.fingerprint() == model
    features = hashlib.sha256(f"{model}|-1|last|1|layer|512".encode()).hexdigest()
    assert plain.fingerprint == features
    text = "Think.\nQ: 1 + 1\nA: 2\nQ: 3\nA:"
    key = hashlib.sha256(f"{features}|float32|transformers\n{text}".encode()).hexdigest()
    assert plain.encode([asked("3")]).keys == (key,)


def test_what_changes_its_prompts_makes_it_another_one_but_not_the_date(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = make(tmp_path / "dated", "llama", width=24)
    (dated / "chat_template.jinja").write_text(TEMPLATE)
    today = PromptStyle(datetime.date(2001, 2, 3), SHOTS.template)
    changes = [{}, {"chat_template_kwargs": {"quiet": True}}, {"template": "{question}"}, {"system": "{question}"}]
    changes += [{"chat_template_kwargs": {"quiet": 1}}, {"system": ""}]
    found = [expert(dated, today, **change) for change in changes]
    assert len({each.fingerprint for each in found}) == len(changes)
    assert found[0].frozen.fingerprint() == load_frozen(str(dated)).fingerprint() != found[1].frozen.fingerprint()
    assert len({each.encode([asked("3")]).keys for each in found}) == len(changes)
    tomorrow = expert(dated, PromptStyle(datetime.date(2001, 2, 4), SHOTS.template))
    assert tomorrow.fingerprint == found[0].fingerprint
    assert tomorrow.encode([asked("3")]).keys != found[0].encode([asked("3")]).keys
    assert (found[0].info()["date"], expert(folder, today).info()["date"]) == ("2001-02-03", "")


def test_of_a_prompt_that_is_too_long_the_middle_is_not_read_and_it_is_counted(folder: Path, tmp_path: Path) -> None:
    short, long = ({"role": "user", "content": text} for text in ("ab", "abcdefghijklmnopqrstuvwxyz"))
    prompts = [(short,), (long,), (long,)]
    small, large = (expert(folder, max_tokens=most, disk=tmp_path / str(most)) for most in (8, 26))
    encoded = small.encode(prompts)
    assert (encoded.cut, small.encode(prompts).cut, large.encode(prompts).cut) == (2, 2, 0)
    assert small.answers(prompts, [0, 1, 2], 2).cut == 2
    tokens = small.frozen.tokenizer("abuvwxyz")["input_ids"]
    assert small.read((long,)).tokens == tokens
    states = small.encoder.states([tokens])[0]
    assert np.corrcoef(encoded.features[1][0], states[0])[0, 1] == pytest.approx(1)
    assert expert(folder, max_tokens=8, disk=tmp_path / "8").encode(prompts).cut == 2, "features were kept, and so read"
    left, right = small.encode(prompts[:1], rows=[1]), small.encode(prompts[1:2], rows=[0])
    assert whole([left, right])[0].cut == 1


@pytest.mark.parametrize(
    ("template", "reason"),
    [("Say it.", r"no \{question\} and no \{prompt\}"), ("{question} {name}", r"\{name\} is neither")],
)
def test_a_wording_without_the_question_is_refused(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ExpertConfig(name="e", model="m", template=template)
