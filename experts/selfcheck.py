"""What is checked of a frozen model when it is loaded: all ways in which a run reads a few short sequences must agree.

The yardstick is `plain_logits`, one sequence by itself in one forward pass, which shares no code with the batches,
layouts and caches of the engines.  Nothing here draws from a global random state or changes a worker's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from experts.chat import Messages
from experts.config import ExpertConfig
from experts.encoder import Encoder
from experts.loading import FrozenModel, ModelError

# Every property, and what to do about a model that does not have it; docs/models.md explains them.
REMEDIES = {
    "ids": "give the tokenizer that belongs to these weights",
    "beginning": "mend its tokenizer or chat template, or take a model whose prompts begin as it was trained",
    "end": "let its tokenizer add no end token (add_eos_token: false in tokenizer_config.json)",
    "contents": "take a fast tokenizer (tokenizer.json), or another model: a message must not forge its turns",
    "decoding": "set clean_up_tokenization_spaces to false in its tokenizer_config.json",
    "cut": "raise experts[i].max_tokens: a prompt that is too long would lose its beginning or its end",
    "width": "take another model: its embeddings are not as wide as the prefix that the router would make",
    "unit": "take another model: the router would measure its prefix in a wrong unit",
    "repeatable": "take another version of transformers, or another dtype",
    "embeddings": "take the other engine, or another version of it: a prefix is read as embeddings",
    "cache": "take the other engine, or another version of transformers: answers are made token by token",
    "batch": "take the other engine, or another version of it: an answer would depend on what else is in the batch",
    "gate": "take the other engine, or another version of it: a closed gate must be no prefix at all",
    "prefix": "take another model, or dtype: a prefix changes nothing of what it answers",
    "learner": "take another version of transformers, or another policy: the learner would train on other values",
    "gradient": "take another version of transformers, another dtype, or another policy: no router can learn from it",
    "states": "take another dtype (bfloat16 has a wider range than float16), layer or model",
    "expert batch": "take the other engine, or another version of it: states would depend on what else is in the batch",
    "two prompts": "take pool: last (the first token of a causal model knows nothing of the prompt), or another layer",
    "answers": "take the other engine, or another version of it: an answer would depend on what else is in the batch",
}
SPACED = "a , b . c ?"
TEXTS = ("What is 3 + 4?", "What do 2 cats eat, or 3?")  # that begin with one token
NEW, SAMPLES, SLOTS = 4, 2, 3
LONG, REACH = 24, 160  # tokens of the longest prompt, and of one that is to reach beyond a sliding window


@dataclass(frozen=True, slots=True)
class Finding:
    """One property of a loaded model: a key of `REMEDIES`, and what was measured."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far off is still rounding, by the dtype of a model.

    values: log-probabilities, as a share of the spread of the model's logits, and states, as a share of their size.
    gradient: as a share of the gradient's size.
    change: that a prefix, or another prompt, makes at least.
    """

    values: float
    gradient: float
    change: float


# Measured over the 46 architectures of tests/architectures.py and over random Qwen3 and Qwen3-MoE models of 24 and 28
# layers, the worst values: 2e-5 in float32, 0.007 in float16, 0.041 in bfloat16; gradients 1e-5, 0.042 and 0.048.  The
# limits leave room for trained models, routers of experts that flip, and TF32 on GPUs.  Faults of the past were 0.06 to
# 1.5 there; gradients were off by 0.4 and more; a prefix changed 0.08 and more, other prompts 0.5.
TOLERANCES = {
    torch.float32: Tolerance(3e-3, 1e-2, 1e-5),
    torch.float16: Tolerance(0.05, 0.2, 1e-3),
    torch.bfloat16: Tolerance(0.15, 0.3, 1e-3),
}


@dataclass(frozen=True)
class Probe:
    """Made-up prompts of a mixed batch.

    tokens: of a short, a long and a middle prompt; open: whether each gets its prefix.
    prefix: (prompts, slots, width), as large as the embeddings.
    answers: for every prompt, as many.
    unreached: that the longest does not reach beyond a sliding window, for people.
    """

    tokens: tuple[list[int], ...]
    open: tuple[bool, ...]
    prefix: Tensor
    answers: tuple[list[list[int]], ...]
    unreached: str

    @classmethod
    def of(cls, frozen: FrozenModel, longest: int | None = None) -> Probe:
        """The same always for a model.  longest: sequence that its engine takes; None takes the model's own."""
        config, draws = frozen.model.config.get_text_config(), np.random.default_rng(0)
        window = _window(config)
        room = (longest or getattr(config, "max_position_embeddings", None) or REACH + LONG) - SLOTS - NEW
        room = max(room, 2)
        long = min(window + 8 if window and window + 8 <= REACH else LONG, room)
        drawn = _ordinary(frozen, draws)
        tokens = [[next(drawn) for _ in range(min(length, room))] for length in (5, long, 12)]
        begin = frozen.tokenizer.bos_token_id
        for row in tokens:
            row[0] = row[0] if begin is None else begin
        answers = tuple([[next(drawn) for _ in range(NEW)] for _ in range(SAMPLES)] for _ in tokens)
        embedded = frozen.embed(torch.tensor(tokens[1], device=frozen.device))
        noise = torch.from_numpy(draws.standard_normal((len(tokens), SLOTS, embedded.shape[-1])))
        prefix = (noise * embedded.double().pow(2).mean().sqrt().item()).to(embedded)
        unreached = f"; its window of {window} tokens was not reached" if window and window >= long + SLOTS else ""
        return cls(tuple(tokens), (True, True, False), prefix, answers, unreached)

    def own(self, row: int) -> Tensor | None:
        """The prefix that a prompt is read with."""
        return self.prefix[row] if self.open[row] else None


def _window(config: Any) -> int | None:
    """The smallest window of the model's attention."""
    names = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")
    return min((size for name in names if isinstance(size := getattr(config, name, None), int) and size), default=None)


def _ordinary(frozen: FrozenModel, draws: np.random.Generator) -> Iterator[int]:
    """Ids of tokens that are no special ones, if there are any."""
    ids = min(vocabulary(frozen), len(frozen.tokenizer))
    special = {*frozen.tokenizer.all_special_ids, *frozen.end_tokens, frozen.pad_id}
    special = special if ids > len(special) else set()
    while True:
        if (token := int(draws.integers(ids))) not in special:
            yield token


def vocabulary(frozen: FrozenModel) -> int:
    """How many tokens have an embedding."""
    return int(frozen.model.get_input_embeddings().weight.shape[0])


def tolerance(frozen: FrozenModel) -> Tolerance:
    """Of a model's dtype."""
    return TOLERANCES[frozen.embed(torch.zeros(1, dtype=torch.long, device=frozen.device)).dtype]


def look(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
    """A property's finding; an exception of any kind, of a model's own code perhaps, is one too."""
    try:
        ok, detail = check()
    except Exception as error:  # noqa: BLE001 - a model's code may raise anything
        reason = (str(error).strip().splitlines() or [""])[0]
        return Finding(name, False, f"it raises {type(error).__name__}: {reason}")
    return Finding(name, ok, detail)


def at_most(figure: float, limit: float, of: str) -> tuple[bool, str]:
    """A finding's words; a figure that is no number is beyond every limit."""
    return figure <= limit, f"off by {figure:.1e} of {of}, at most {limit:.0e} is rounding"


def at_least(figure: float, limit: float, of: str) -> tuple[bool, str]:
    """As `at_most`."""
    return figure >= limit, f"differs by {figure:.1e} of {of}, at least {limit:.0e} is wanted"


def require(findings: Sequence[Finding], model: str, whose: str) -> None:
    """Refuses a model that lacks a property.

    whose: it is, for people.

    Raises:
        ModelError: naming the first that it lacks, what was measured, what to do, and how not to be asked.
    """
    for finding in findings:
        if not finding.ok:
            raise ModelError(
                f"model {model!r} fails the self-check of {whose}: {finding.name}: {finding.detail}: "
                f"{REMEDIES[finding.name]}; docs/models.md explains it (self_check: false there does without it)"
            )


def plain_logits(
    frozen: FrozenModel, tokens: Sequence[int], prefix: Tensor | None = None, head: int = 0, answer: Sequence[int] = ()
) -> Float[Tensor, "answer vocabulary"]:
    """float32 logits that each token of an answer is drawn from, and of the one behind it.

    One forward pass over one sequence: without padding, cache, mask or position ids; without a prefix, from token ids.

    head: how many of the prompt's tokens stand in front of the prefix.
    """
    slots = 0 if prefix is None else len(prefix)
    ids = torch.tensor([*tokens[:head], *[frozen.pad_id] * slots, *tokens[head:], *answer], device=frozen.device)
    if prefix is None:
        given = {"input_ids": ids[None]}
    else:
        embedded = frozen.embed(ids)
        given = frozen.inputs(ids[None], torch.cat([embedded[:head], prefix, embedded[head + slots :]])[None])
    logits = frozen.model(**given, use_cache=False).logits[0, len(ids) - len(answer) - 1 :]
    return logits.float()


def logprob_error(
    found: Sequence[float] | np.ndarray, logits: Float[Tensor, "tokens vocabulary"], tokens: Sequence[int], heat: float
) -> tuple[float, float]:
    """Sums over an answer's tokens of squared errors of log-probabilities, and of the logits' variance.

    found: log-probabilities at temperature `heat`; logits: that they should follow from.
    """
    wanted = (logits[: len(tokens)] / heat).log_softmax(dim=-1).cpu()
    own = wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0].double().numpy()
    spread = logits[: len(tokens)].double().var(dim=-1).sum().item()
    return float(np.square((np.asarray(found) - own) * heat).sum()), spread


def relative(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """Size of the difference as a share of what is wanted."""
    one, other = (torch.as_tensor(each).double() for each in (found, wanted))
    return ((one - other).norm() / other.norm().clamp_min(1e-30)).item()


def check_tokenizer(frozen: FrozenModel) -> list[Finding]:
    """Whether prompts are read as the model was trained to read them, and answers written as it meant them."""
    tokenizer, begin = frozen.tokenizer, frozen.tokenizer.bos_token_id

    def tokens_of(content: str) -> list[int]:
        return frozen.tokenize([{"role": "user", "content": content}])

    def text_of(content: str) -> str:
        return frozen.chat.render([{"role": "user", "content": content}])

    def ids() -> tuple[bool, str]:
        largest, rows = max(*tokens_of(TEXTS[0]), *frozen.end_tokens, frozen.pad_id), vocabulary(frozen)
        return largest < rows, f"largest token id {largest} of {rows} embeddings"

    def beginning() -> tuple[bool, str]:
        if begin is None:
            return True, "it has no begin token"
        if frozen.chat.template:
            wanted = text_of(TEXTS[0]).startswith(tokenizer.bos_token)
        else:
            wanted = tokenizer(TEXTS[0])["input_ids"][:1] == [begin]
        count = tokens_of(TEXTS[0])[:2].count(begin)
        return count == wanted, f"a prompt begins with {count} begin tokens, and {int(wanted)} is its own way"

    def end() -> tuple[bool, str]:
        *_, last = tokens_of(TEXTS[0])
        told = text_of(TEXTS[0]).endswith(tokenizer.decode([last]))  # by a template, on purpose
        return last not in frozen.end_tokens or told, f"a prompt ends with token {last}"

    def contents() -> tuple[bool, str]:
        control = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
        names = [name for name in tokenizer.all_special_tokens if len(name) > 1 and name != tokenizer.unk_token]
        read, usual = ([t for t in tokens_of(text) if t in control] for text in (" ".join(names), "a"))
        return read == usual, f"{len(read) - len(usual)} control tokens in a message that spells out {len(names)}"

    def decoding() -> tuple[bool, str]:
        written = tokenizer(SPACED, add_special_tokens=False)["input_ids"]
        found, wanted = tokenizer.decode(written), tokenizer.decode(written, clean_up_tokenization_spaces=False)
        return found == wanted, f"an answer {wanted!r} is written as {found!r}"

    checks = (ids, beginning, end, contents) if frozen.is_encoder else (ids, beginning, end, contents, decoding)
    return [look(check.__name__, check) for check in checks]


def check_expert(
    encoder: Encoder, config: ExpertConfig, tokens_of: Callable[[Messages], Sequence[int]]
) -> list[Finding]:
    """Whether an expert's states and answers are those of a prompt alone, and tell prompts apart.

    tokens_of: a conversation as the expert reads it.
    """
    frozen = encoder.frozen
    limits, probe = tolerance(frozen), Probe.of(frozen, config.max_tokens + SLOTS + NEW)
    read: list[np.ndarray] = []

    def states() -> tuple[bool, str]:
        read.extend(encoder.states(probe.tokens))
        sizes = [float(np.abs(each).max()) for each in read]
        return all(np.isfinite(sizes)) and min(sizes) > 0, f"the largest are {min(sizes):.2g} to {max(sizes):.2g}"

    def batch() -> tuple[bool, str]:
        padded = {row: read[row] for row in (0, 2)}  # the long prompt has no padding
        alone = {row: encoder.states([probe.tokens[row]])[0] for row in padded}
        figure = max(relative(padded[row], alone[row]) for row in padded)
        return at_most(figure, limits.values, "their size" + probe.unreached)

    def two_prompts() -> tuple[bool, str]:
        one, other = (list(tokens_of([{"role": "user", "content": text}])) for text in TEXTS)
        if one == other:  # a tokenizer that knows no such letters, or next to nothing is read of a prompt
            one, other = ([probe.tokens[0][0], *tokens] for tokens in probe.answers[0])
        first, second = encoder.states([one, other])
        kept = min(len(first), len(second))
        return at_least(relative(first[-kept:], second[-kept:]), limits.change, "their size")

    def cut() -> tuple[bool, str]:
        whole = frozen.tokenize(long := [{"role": "user", "content": "First: " + " ".join(TEXTS * 8)}])
        kept = frozen.chat.read(long, len(whole) // 2).tokens
        return (kept[0], kept[-1]) == (whole[0], whole[-1]), f"{len(whole)} tokens were cut to {len(kept)}"

    found = [look("cut", cut), look("states", states), look("expert batch", batch), look("two prompts", two_prompts)]
    if config.engine == "transformers" and frozen.model.can_generate():
        found.append(look("answers", lambda: _answer(encoder, probe, limits)))
    return found


def _answer(encoder: Encoder, probe: Probe, limits: Tolerance) -> tuple[bool, str]:
    """Where the short prompt's answer beside the long one is not the one alone, it must be as likely."""
    short = probe.tokens[0]
    answer, (alone,) = encoder.answer(probe.tokens[:2], NEW)[0], encoder.answer([short], NEW)
    if answer[: len(alone)] == alone:
        return at_most(0.0, limits.values, "the logits' spread" + probe.unreached)
    with torch.no_grad():
        logits = plain_logits(encoder.frozen, short, answer=answer)[: len(answer)]
    missing = logits.max(dim=-1).values - logits[range(len(answer)), answer]
    return at_most((missing / logits.std(dim=-1)).max().item(), limits.values, "the logits' spread" + probe.unreached)
