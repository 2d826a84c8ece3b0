"""Untrained tokenizers and models of a recipe, and their forward pass over laid-out batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import printable
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from cluster.zoo.recipe import END, FILLER, ModelRecipe, TokenizerRecipe
from rollout.sequence import CompletionBatch, PromptBatch, lay_out_completions, lay_out_prompts, with_prefix

PAD, UNKNOWN = "<pad>", "<unknown>"


def train_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str]) -> Any:
    """A PreTrainedTokenizerFast with pad, end, unknown and filler tokens; it adds no token by itself."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    numbers = r"\d+" if recipe.numbers == "whole" else r"\d"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"-?{numbers}|\n+"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[PAD, END, UNKNOWN, FILLER],
        initial_alphabet=sorted(set(printable) - set("\t\r\x0b\x0c")),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[FILLER],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def new_model(recipe: ModelRecipe, tokenizer: Any) -> Any:
    """A causal language model with fresh weights from torch's current generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.width,
        "intermediate_size": recipe.feedforward,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if recipe.architecture != "gpt_neox":
        settings["num_key_value_heads"] = recipe.kv_heads
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(recipe.architecture, **settings))


def answer_logits(
    model: Any,
    prompts: PromptBatch,
    completions: CompletionBatch,
    prefix: Float[Tensor, "batch slots width"] | None = None,
    gap: Tensor | None = None,
) -> Float[Tensor, "batch length vocabulary"]:
    """Logits of the token that follows the prompt, and of each further completion token.

    gap: (batch,) added to every position behind the slots, which stand in front.
    """
    embed = model.get_input_embeddings()
    given = completions.tokens[:, :-1]
    inputs = torch.cat([with_prefix(embed(prompts.tokens), prefix, prompts), embed(given)], dim=1)
    positions = torch.cat([prompts.positions, completions.positions[:, :-1]], dim=1)
    if gap is not None:
        behind = torch.cat([prompts.slot < 0, torch.ones_like(given, dtype=torch.bool)], dim=1)
        positions = positions + gap[:, None] * behind
    total = prompts.mask.shape[1]
    mask = completions.mask[:, : total + given.shape[1]]
    states = model.base_model(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
    return model.get_output_embeddings()(states.last_hidden_state[:, total - 1 :])


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    hints: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 4,
    batch: int = 200,
) -> list[str]:
    """Greedy answers; `hints` are the token ids of the slots in front, one row a prompt."""
    model.eval()
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        rows = prompts[start : start + batch]
        slots = 0 if hints is None else len(hints[0])
        layout = lay_out_prompts(rows, slots, tokenizer.pad_token_id)
        prefix = None
        if hints is not None:
            prefix = model.get_input_embeddings()(torch.tensor(hints[start : start + batch]))
        grown: list[list[int]] = [[] for _ in rows]
        for _ in range(max_new_tokens):
            behind = lay_out_completions(
                layout, [[[*row, tokenizer.pad_token_id]] for row in grown], tokenizer.pad_token_id
            )
            chosen = answer_logits(model, layout, behind, prefix)[:, -1].argmax(dim=-1).tolist()
            for row, token in zip(grown, chosen, strict=True):
                row.append(token)
            if all(tokenizer.eos_token_id in row for row in grown):
                break
        for row in grown:
            length = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            answers.append(tokenizer.decode(row[:length]))
    return answers
