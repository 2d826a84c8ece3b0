"""A trained router in one process: what it answers, what it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import ConfigError
from cluster.serve.local import Musketeers
from cluster.serve.opening import ready
from experts.loading import load_frozen
from experts.standins import write_stand_ins
from experts.state import RouterError
from rollout.answerer import PromptError, PromptTooLongError
from rollout.continuous import Decoding
from tests.models import make
from tests.serve.conftest import save_bundle

QUESTIONS = ["3 + 4", "what is 5 times 2?", "a", "hello there"]


def test_answers_say_whom_the_router_listened_to(musketeers: Musketeers) -> None:
    answers = musketeers.generate(QUESTIONS)
    assert len({answer.text for answer in answers}) > 1
    for answer in answers:
        assert list(answer.attention) == ["one", "two"] and sum(answer.attention.values()) == pytest.approx(1)
        assert answer.gate and answer.texts == (answer.text,) and answer.finish in ("stop", "length")
    assert len({round(answer.attention["one"], 6) for answer in answers}) == len(answers)


def test_one_question_is_as_good_as_several_and_a_conversation_is_taken_as_it_is(musketeers: Musketeers) -> None:
    several = musketeers.generate(QUESTIONS)
    assert [musketeers.generate(question)[0].text for question in QUESTIONS] == [answer.text for answer in several]
    message = {"role": "user", "content": "Q: 3 + 4\nA:"}  # as the run's template makes it
    assert musketeers.generate([message]) == musketeers.generate([[message]]) == musketeers.generate("3 + 4")
    other = musketeers.generate([{"role": "user", "content": "3 + 4"}])
    assert other != musketeers.generate("3 + 4")


def test_a_hidden_expert_is_not_listened_to(musketeers: Musketeers) -> None:
    (answer,) = musketeers.generate("3 + 4", hidden=["one"])
    assert answer.attention == {"one": 0.0, "two": pytest.approx(1.0)} and answer.hidden == ("one",)
    with pytest.raises(ValueError, match="no expert is called 'three'"):
        musketeers.generate("3 + 4", hidden=["three"])
    with pytest.raises(ValueError, match="at least one expert"):
        musketeers.generate("3 + 4", hidden=["one", "two"])


def test_samples_depend_on_the_seed_alone(musketeers: Musketeers) -> None:
    (first,) = musketeers.generate("3 + 4", temperature=1.0, samples=8, seed=1)
    assert musketeers.generate("3 + 4", temperature=1.0, samples=8, seed=1) == [first]
    assert len(set(first.texts)) > 4
    assert musketeers.generate("3 + 4", temperature=1.0, samples=8, seed=2)[0].texts != first.texts


def test_answers_end_at_the_run_s_stop_strings_and_at_those_that_are_asked_for(
    musketeers: Musketeers, bundle: Path
) -> None:
    whole = musketeers.compare(QUESTIONS)
    first, second = (max((each.answer.text for each in whole), key=len)[at : at + 2] for at in (1, 3))

    def cut(text: str, *stops: str) -> str:
        return min([text, *(text.partition(stop)[0] for stop in stops)], key=len)

    for stop in (second, [second]):
        texts = [answer.text for answer in musketeers.generate(QUESTIONS, stop=stop)]
        assert texts == [cut(each.answer.text, second) for each in whole] != [each.answer.text for each in whole]
    with pytest.raises(ValueError, match="stop string must not be empty"):
        musketeers.generate(QUESTIONS, stop=["a", ""])
    with Musketeers.from_run(bundle, f"sampling.stop=['{first}', 'e']") as other:
        answers = other.generate(QUESTIONS, stop=second)
        assert [a.text for a in answers] == [cut(each.answer.text, first, "e", second) for each in whole]
        assert {a.finish for a in answers if "e" in a.text} == set()
        for mine, each in zip(other.compare(QUESTIONS), whole, strict=True):
            assert mine.alone == cut(each.alone, first, "e")
            assert mine.experts == {name: cut(text, first, "e") for name, text in each.experts.items()}


def test_alone_is_the_policy_as_transformers_runs_it(musketeers: Musketeers, bundle: Path) -> None:
    found = musketeers.compare(QUESTIONS)
    assert [each.answer for each in found] == musketeers.generate(QUESTIONS)
    for name, said in {
        "policy": [each.alone for each in found],
        "one": [each.experts["one"] for each in found],
    }.items():
        model = load_frozen(str(bundle.parent / name))
        for question, mine in zip(QUESTIONS, said, strict=True):
            tokens = torch.tensor([model.tokenizer(f"Q: {question}\nA:")["input_ids"]])
            ends = list(model.end_tokens)
            with torch.no_grad():
                out = model.model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=6,
                    do_sample=False,
                    eos_token_id=ends,
                    pad_token_id=0,
                )
            new = [token for token in out[0, tokens.shape[1] :].tolist() if token not in ends]
            assert model.tokenizer.decode(new) == mine


def test_a_stream_says_what_a_batch_says(musketeers: Musketeers) -> None:
    policy, how = musketeers.policy, Decoding(temperature=0.0, max_new_tokens=6)

    async def streamed(question: str) -> tuple[list[int], np.ndarray]:
        messages = musketeers.opened.messages(question)
        encoded = [expert.encode([messages]) for expert in musketeers.experts]
        opened = policy.open(messages, encoded, how)
        return [t async for piece in policy.stream(opened, how) for t in piece.tokens], opened.attention

    async def everyone() -> list[tuple[list[int], np.ndarray]]:
        return await asyncio.gather(*map(streamed, QUESTIONS))

    answers = musketeers.generate(QUESTIONS)
    for answer, (tokens, attention) in zip(answers, asyncio.run(everyone()), strict=True):
        shown = [token for token in tokens if token not in policy.policy.end_tokens]
        assert policy.policy.tokenizer.decode(shown) == answer.text and len(tokens) == answer.tokens
        assert attention == pytest.approx(list(answer.attention.values()), abs=1e-5)


def test_an_absent_expert_is_hidden_and_without_any_there_is_no_prefix(musketeers: Musketeers) -> None:
    policy, how = musketeers.policy, Decoding(max_new_tokens=6)
    messages = musketeers.opened.messages("3 + 4")
    encoded = [expert.encode([messages]) for expert in musketeers.experts]
    opened = policy.open(messages, [None, encoded[1]], how)
    assert opened.hidden == ("one",) and opened.attention[0] == 0 and opened.slots == 4
    (hidden,) = musketeers.generate("3 + 4", hidden=["one"])
    assert opened.attention == pytest.approx(list(hidden.attention.values()))
    bare = policy.open(messages, [None, None], how)
    assert bare.prefix is None and not bare.gate and bare.hidden == ("one", "two") and not bare.attention.any()


def test_a_stand_in_takes_an_absent_experts_place(bundle: Path, tmp_path: Path, musketeers: Musketeers) -> None:
    copy, how = shutil.copytree(bundle, tmp_path / "copy"), Decoding(max_new_tokens=6)
    opening = musketeers.opened
    other = musketeers.experts[0].encode([opening.messages("what is 5 times 2?")])
    write_stand_ins(copy, opening.trained.snapshot.checksum, {"one": other.features[0]})
    with Musketeers(ready(copy)) as opened:
        policy, messages = opened.policy, opening.messages("3 + 4")
        one, two = (expert.encode([messages]) for expert in opened.experts)
        stood_in = policy.open(messages, [None, two], how)
        seen = policy.open(messages, [other, two], how)
        assert torch.equal(stood_in.prefix, seen.prefix) and np.array_equal(stood_in.attention, seen.attention)
        assert stood_in.hidden == ("one",), "what is missing is still told"
        assert not torch.equal(stood_in.prefix, policy.open(messages, [one, two], how).prefix)
        masked = policy.open(messages, [one, None], how)
        assert masked.attention[1] == 0 and masked.hidden == ("two",), "there is none for this one"
        assert policy.open(messages, [None, None], how).prefix is None, "with nobody there, nothing is made up"
        (answer,) = opened.generate("3 + 4", hidden=["one"])
        assert answer.hidden == ("one",) and list(answer.attention.values()) == pytest.approx(list(seen.attention))
        assert answer.attention["one"] > 0
        (several,) = opened.generate([messages], hidden=["two"])
        assert several.attention["two"] == 0


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(musketeers: Musketeers) -> None:
    asked = len(musketeers.policy.policy.tokenize(musketeers.opened.messages("x" * 599)))
    with pytest.raises(PromptTooLongError, match=rf"is 512 tokens; {asked} of the prompt, 4 of the prefix and 6 of"):
        musketeers.generate("x" * 599)
    assert musketeers.generate([]) == []


def test_only_where_and_how_fast_models_run_may_change(bundle: Path) -> None:
    assert ready(bundle, overrides=["experts.0.batch=7", "threads=2"]).config.experts[0].batch == 7
    for override in ("router.latents=3", "data.template='{question}'", "policy.lora={rank: 4}", "seed=4"):
        with pytest.raises(ConfigError, match="cannot be changed any more"):
            ready(bundle, overrides=[override])
    with pytest.raises(ConfigError, match="unknown key"):
        ready(bundle, overrides=["experts.0.color=red"])


def test_another_model_in_an_experts_place_is_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "llama", width=24, seed=77)
    with pytest.raises(RouterError, match="one is another model than the router was trained with"):
        Musketeers.from_run(bundle, f"experts.0.model={other}")
    copy = shutil.copytree(bundle.parent / "one", tmp_path / "copy")
    with Musketeers.from_run(bundle, f"experts.0.model={copy}") as same:
        assert same.generate("3 + 4")[0].text


@pytest.mark.parametrize("kind", ["static", "text", "none"])
def test_other_collaborators_answer_too(bundle: Path, tmp_path: Path, kind: str) -> None:
    values = yaml.safe_load((bundle / "recipe.yaml").read_text())
    values["router"] |= {"kind": kind, "gate": False}
    values["policy"]["lora"] = {"rank": 2} if kind == "text" else None
    with Musketeers.from_run(save_bundle(tmp_path / "other", values)) as other:
        (answer,) = other.generate("3 + 4")
        assert answer.gate == (kind == "static") and answer.attention == {"one": 0.0, "two": 0.0}
        hidden = [other.generate(q, hidden=["one"])[0].text for q in QUESTIONS]
        assert (hidden != [answer.text for answer in other.generate(QUESTIONS)]) == (kind == "text")


def test_the_command_prints_answers_and_attention(bundle: Path, musketeers: Musketeers) -> None:
    expected = musketeers.generate("3 + 4")[0]
    shown = CliRunner().invoke(app, ["generate", str(bundle), "3 + 4", "--compare"])
    assert shown.exit_code == 0, shown.output
    assert expected.text in shown.output and f"{expected.attention['one']:.0%}" in shown.output
    assert "policy alone" in shown.output and "two alone" in shown.output
    lines = CliRunner().invoke(app, ["generate", str(bundle), "-", "--json"], input="3 + 4\n\na\n")
    found = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [each["prompt"] for each in found] == ["3 + 4", "a"] and found[0]["text"] == expected.text


def test_a_recipe_that_does_not_belong_to_the_weights_is_refused(bundle: Path, tmp_path: Path) -> None:
    for key, value in {"heads": 2, "latents": 3, "gate": False}.items():
        edited = shutil.copytree(bundle, tmp_path / key)
        values = yaml.safe_load((edited / "recipe.yaml").read_text())
        values["router"][key] = value
        (edited / "recipe.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(RouterError, match=rf"its recipe has router\.{key} {value}"):
            ready(edited)


def test_what_a_template_refuses_is_the_prompts_fault(musketeers: Musketeers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(musketeers.policy.policy.tokenizer, "chat_template", "{{ raise_exception('no system') }}")
    with pytest.raises(PromptError, match="refuses this conversation: no system"):
        musketeers.policy.open([{"role": "user", "content": "a"}], [], Decoding())


def test_an_expert_is_asked_in_its_own_words_and_what_a_message_spells_is_text(bundle: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((bundle / "recipe.yaml").read_text())
    values["experts"][0] |= {"template": "{question} =", "system": "Sum up."}
    own = save_bundle(tmp_path / "own", values)
    with Musketeers.from_run(own) as opened:
        one, two = opened.experts
        for asked in (opened.opened.messages("3 + 4"), [{"role": "user", "content": "3 + 4"}]):
            assert one.read(asked).tokens == two.frozen.tokenizer("Sum up.\n3 + 4 =")["input_ids"]
        assert two.read(opened.opened.messages("3 + 4")).tokens == two.frozen.tokenizer("Q: 3 + 4\nA:")["input_ids"]
        assert opened.generate("3 + 4")[0].text is not None
        for read in (opened.policy.tokens_of, lambda messages: one.read(messages).tokens):
            assert 1 not in read([{"role": "user", "content": "a<eos>b"}])
    with pytest.raises(RouterError, match=r"one is another model than .* and wording of prompts, or train again"):
        Musketeers.from_run(own, "experts.0.template='{question}'")
