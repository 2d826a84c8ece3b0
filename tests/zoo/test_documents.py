from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoTokenizer

from cluster.zoo.corpus import Documents, ExpertCorpus, PolicyCorpus
from cluster.zoo.hints import Hints
from cluster.zoo.models import answer_logits, greedy, new_model, train_tokenizer
from cluster.zoo.recipe import HintRecipe, ModelRecipe, Phase, Recipe, TokenizerRecipe
from cluster.zoo.training import loss_of, train
from cluster.zoo.worker import save_tokenizer
from rewards.sources import Task, build_tasks
from rewards.splits import questions_of
from rollout.sequence import lay_out_completions, lay_out_prompts


@pytest.fixture(scope="module")
def tokenizer(recipe: Recipe, tasks: dict[str, Task]) -> Any:
    texts = [prompt.text + prompt.answer for task in tasks.values() for prompt in task.train]
    return train_tokenizer(recipe.policy.tokenizer, texts)


@pytest.fixture(scope="module")
def corpus(recipe: Recipe, tasks: dict[str, Task], tokenizer: Any) -> PolicyCorpus:
    return PolicyCorpus(recipe.policy, tasks, tokenizer)


def test_template_sentences_are_few_tokens_and_numbers_one(tasks: dict[str, Task], tokenizer: Any) -> None:
    assert tokenizer.tokenize("What is 3 plus 14?\nAnswer:") == ["What is ", "3", " plus ", "14", "?", "\n", "Answer:"]
    for prompt in tasks["both"].test:
        assert tokenizer.decode(tokenizer.encode(prompt.text)) == prompt.text


def test_a_policy_may_read_numbers_digit_by_digit() -> None:
    texts = ["How much is 14?"] * 50
    digits, whole = (train_tokenizer(TokenizerRecipe(vocabulary=160, numbers=n), texts) for n in ("digits", "whole"))
    assert digits.tokenize("14?") == ["1", "4", "?"]
    assert whole.tokenize("14?") == ["14", "?"]


def test_hints_are_what_their_text_is_in_tokens(recipe: Recipe, tasks: dict[str, Task], tokenizer: Any) -> None:
    hints = Hints(recipe.policy.hint, tasks, tokenizer)
    both = tasks["both"].train[0]
    first, second = (part["answer"] for part in both.payload["parts"])
    assert hints.right(both) == tokenizer.encode(f"{first}+{second}#####")
    twice = tasks["twice"].train[0]
    assert hints.right(twice) == tokenizer.encode(f"#+{twice.answer}#####")
    with_others = [hints.right(twice, np.random.default_rng(seed)) for seed in range(20)]
    assert {row[2] for row in with_others} == {tokenizer.encode(twice.answer)[0]}
    assert len({row[0] for row in with_others}) > 3
    assert hints.operands({"plus": "I do not know", "twice": "4"}) == tokenizer.encode("#+4#####")


def test_a_world_that_is_split_by_question_trains_on_no_held_out_one(recipe: Recipe, tokenizer: Any) -> None:
    tasks = build_tasks(recipe.data.model_copy(update={"split_by": "question"}))
    corpora = [ExpertCorpus(expert, tasks, tokenizer) for expert in recipe.experts]
    corpora.append(PolicyCorpus(recipe.policy, tasks, tokenizer))
    entries = [entry for corpus in corpora for pool in corpus.pools.entries.values() for entry in pool]
    trained = {part["question"] for entry in entries for part in questions_of(entry.prompt)}
    held_out = [prompt for task in tasks.values() for prompt in (*task.validation, *task.test)]
    assert len(trained) > 50 and len(held_out) > 50
    assert not trained & {part["question"] for prompt in held_out for part in questions_of(prompt)}


def test_an_experts_target_is_its_own_part(recipe: Recipe, tasks: dict[str, Task], tokenizer: Any) -> None:
    held_out = {tuple(tokenizer.encode(p.text)) for task in tasks.values() for p in (*task.validation, *task.test)}
    answers = {tuple(tokenizer.encode(p.text)): p.answer for p in tasks["twice"].train}
    answers |= {tuple(tokenizer.encode(p.text)): p.payload["parts"][1]["answer"] for p in tasks["both"].train}
    documents = ExpertCorpus(recipe.experts[1], tasks, tokenizer).draw(64, np.random.default_rng(0))
    for prompt, target in zip(documents.prompts, documents.targets, strict=True):
        assert tokenizer.decode(target) == answers[tuple(prompt)] + "<end>"
        assert tuple(prompt) not in held_out
    assert 20 <= sum(tokenizer.decode(p).startswith("Problem 1") for p in documents.prompts) <= 44


def test_a_policys_documents_keep_the_recipes_shares(corpus: PolicyCorpus, tokenizer: Any) -> None:
    documents = corpus.draw(800, np.random.default_rng(0))
    assert documents.hints is not None and documents.slot_mask is not None and documents.scale is not None
    blank = (documents.hints == corpus.hints.filler).all(dim=1)
    hidden = ~documents.slot_mask.all(dim=1)
    zero = documents.scale == 0
    shares = [float(kind.float().mean()) for kind in (~blank, hidden, blank & ~hidden & ~zero, zero)]
    assert shares == pytest.approx([0.5, 0.25, 0.125, 0.125], abs=0.01)
    assert not (hidden & ~blank).any() and not (zero & ~blank).any()
    answers = {tuple(entry.ids): list(entry.target) for pool in corpus.pools.entries.values() for entry in pool}
    assert all(list(t) == answers[tuple(p)] for p, t in zip(documents.prompts, documents.targets, strict=True))


def test_corrupted_targets_come_only_without_a_hint(recipe: Recipe, tasks: dict[str, Task], tokenizer: Any) -> None:
    hint = HintRecipe(layout="answer", right=1.0, corrupted=0.8)
    corpus = PolicyCorpus(recipe.policy.model_copy(update={"hint": hint}), tasks, tokenizer)
    documents = corpus.draw(800, np.random.default_rng(0))
    assert documents.hints is not None
    answers = {tuple(entry.ids): list(entry.target) for pool in corpus.pools.entries.values() for entry in pool}
    wrong = np.array([list(t) != answers[tuple(p)] for p, t in zip(documents.prompts, documents.targets, strict=True)])
    hinted = (documents.hints != corpus.hints.filler).any(dim=1).numpy()
    assert not wrong[hinted].any()
    assert 0.6 < wrong[~hinted].mean() < 0.85
    for row in np.flatnonzero(hinted):
        assert documents.hints[row].tolist() == corpus.hints.answer(list(documents.targets[row])[:-1])


def test_warm_documents_are_the_last_line_behind_a_gap(corpus: PolicyCorpus, tokenizer: Any) -> None:
    documents = corpus.draw_warm(64, np.random.default_rng(0))
    assert documents.gap is not None and documents.slot_mask is not None
    assert {tokenizer.decode(ids) for ids in documents.prompts} == {"What is the sum of the two answers?\nAnswer:"}
    longest = max(len(entry.ids) for entry in corpus.pools.entries["both"])
    assert documents.gap.min() == 0 and longest - 8 < documents.gap.max() + len(documents.prompts[0]) <= longest
    assert documents.slot_mask.all()


SHAPES = [
    ModelRecipe(architecture="llama", width=16, layers=2, heads=2, kv_heads=1, feedforward=32),
    ModelRecipe(architecture="qwen2", width=16, layers=2, heads=2, kv_heads=1, feedforward=32),
    ModelRecipe(architecture="gpt_neox", width=16, layers=2, heads=2, kv_heads=2, feedforward=32),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.architecture)
def test_shortcuts_leave_loss_and_gradient_as_they_are(
    shape: ModelRecipe, corpus: PolicyCorpus, tokenizer: Any
) -> None:
    """Batches split by length with a shortened last block, against one document at a time without padding."""
    torch.manual_seed(0)
    model = new_model(shape, tokenizer)
    documents = corpus.draw(24, np.random.default_rng(1))
    parts = documents.by_length()
    assert len(parts) == 2 and sum(len(part.prompts) for part in parts) == 24
    loss = torch.stack([loss_of(model, part, tokenizer.pad_token_id) for part in parts]).sum()
    quick = torch.autograd.grad(loss, list(model.parameters()))
    plain_loss = torch.stack([_alone(model, documents, row) for row in range(24)]).sum()
    plain = torch.autograd.grad(plain_loss, list(model.parameters()))
    assert loss.item() == pytest.approx(plain_loss.item(), rel=1e-5)
    for one, other in zip(quick, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def _alone(model: Any, documents: Documents, row: int) -> torch.Tensor:
    assert documents.hints is not None and documents.slot_mask is not None and documents.scale is not None
    target = torch.tensor(documents.targets[row])
    text = torch.tensor([[*documents.prompts[row], *documents.targets[row][:-1]]])
    inputs = model.get_input_embeddings()(text)
    if documents.slot_mask[row].all():
        region = model.get_input_embeddings()(documents.hints[row : row + 1]) * documents.scale[row]
        inputs = torch.cat([region, inputs], dim=1)
    logits = model(inputs_embeds=inputs, use_cache=False).logits[0, -len(target) :]
    return cross_entropy(logits, target, reduction="sum")


def test_gaps_move_the_positions_behind_the_slots(corpus: PolicyCorpus, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = new_model(SHAPES[1], tokenizer)
    prompts = lay_out_prompts([[5, 6, 7]], 2, tokenizer.pad_token_id)
    completions = lay_out_completions(prompts, [[[8, 9]]], tokenizer.pad_token_id)
    prefix = model.get_input_embeddings()(torch.tensor([[3, 4]]))
    moved = answer_logits(model, prompts, completions, prefix, torch.tensor([7]))
    whole = model(
        input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]]),
        position_ids=torch.tensor([[0, 1, 9, 10, 11, 12]]),
        attention_mask=torch.ones(1, 6, dtype=torch.int64),
    ).logits[:, -2:]
    torch.testing.assert_close(moved, whole)


def test_training_teaches_an_expert_its_task(recipe: Recipe, tasks: dict[str, Task], tokenizer: Any) -> None:
    torch.manual_seed(0)
    expert = recipe.experts[1].model_copy(update={"mixture": {"twice": 1.0}})
    shape = ModelRecipe(architecture="llama", width=64, layers=1, heads=2, kv_heads=2, feedforward=128)
    model = new_model(shape, tokenizer)
    losses: list[float] = []
    train(
        model,
        Phase(steps=100, batch=24, lr=5e-3, warmup=5),
        ExpertCorpus(expert, tasks, tokenizer).draw,
        np.random.default_rng(0),
        tokenizer.pad_token_id,
        lambda step, loss: losses.append(loss),
    )
    assert losses[0] > 4 and losses[-1] < 0.5
    prompts = tasks["twice"].train
    answers = greedy(model, tokenizer, [tokenizer.encode(prompt.text) for prompt in prompts])
    assert np.mean([a == p.answer for a, p in zip(answers, prompts, strict=True)]) > 0.9


@pytest.mark.parametrize("kind", ["qwen2", "gpt_neox", "qwen3", "phi3", "llama", "gemma3_text"])
def test_a_tokenizer_is_read_back_beside_a_model_of_any_type(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert None not in settings["auto_map"]["AutoTokenizer"][1:]
    found = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is 3 plus 14?\nAnswer:"
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
