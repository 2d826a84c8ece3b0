"""A trained router in one process: `from cluster import Musketeers`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from cluster.run.asked import answer_tokens
from cluster.run.start import expert_recipes, rollout_recipes
from cluster.serve.opening import Ready, ready
from experts.expert import Encoded, Expert
from experts.state import RouterError
from rollout.answerer import Answerer
from rollout.types import Group, Message, Prompt, Sampling

Asked = str | Sequence[Message]


@dataclass(frozen=True)
class Answer:
    """What the policy answered to one prompt.

    text: the first of `texts`, of which there is one a sample.
    finish: `stop` or `length`.
    tokens: sampled for the first, the end token included.
    attention: share of the router's attention by expert, the mean over heads and slots; of one that was left out, its
        stand-in's.
    gate: whether the policy got the router's prefix.
    hidden: experts that were left out.
    """

    text: str
    texts: tuple[str, ...]
    finish: str
    tokens: int
    attention: Mapping[str, float]
    gate: bool
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compared:
    """An answer beside what the policy says without any help, and each expert by itself."""

    answer: Answer
    alone: str
    experts: Mapping[str, str]


class Musketeers:
    """Frozen experts, a frozen policy and the router that was trained for them, in this process; no Ray.

    Use it as a context manager, or `close` it: engines may have processes of their own.
    """

    def __init__(self, opened: Ready) -> None:
        self.opened = opened
        config = opened.config
        with contextlib.ExitStack() as built:
            self.experts: list[Expert] = []
            for recipes, fingerprint in zip(expert_recipes(config), opened.shape.expert_fingerprints, strict=True):
                expert = Expert(*recipes[0].args)
                built.callback(expert.close)
                refuse_other(expert.config.name, expert.fingerprint, fingerprint)
                self.experts.append(expert)
            policy, path, router, _, _, threads, date = rollout_recipes(config)[0].args
            known = (opened.shape, opened.trained.snapshot, threads, opened.trained.stand_ins)
            self.policy = Answerer(policy, path, router, *known, date)
            built.callback(self.policy.close)
            refuse_other("the policy", self.policy.policy.fingerprint(), opened.shape.policy_fingerprint)
            self._built = built.pop_all()

    @classmethod
    def from_run(cls, place: str | Path, *overrides: str, step: int | None = None) -> Musketeers:
        """Opens a run's folder, a bundle (`musketeers export`), or one on the hub (`hub:USER/NAME`).

        Args:
            overrides: of the run's configuration, such as `policy.engine=vllm` or `experts.0.gpus=1`.
            step: which checkpoint of a run; the last by default.

        Raises:
            ValueError: one line, when there is none, or the models are not those it was trained with.
        """
        return cls(ready(place, step, overrides))

    def generate(
        self,
        prompts: Asked | Sequence[Asked],
        *,
        temperature: float = 0.0,
        max_new_tokens: int | None = None,
        samples: int = 1,
        seed: int = 0,
        hidden: Sequence[str] = (),
        stop: str | Sequence[str] = (),
    ) -> list[Answer]:
        """An answer to every prompt, in one batch.

        Args:
            prompts: each a question, which gets the run's template and system message, or a conversation, which is
                taken as it is; one alone, or several.
            temperature: 0 takes the most likely tokens.
            max_new_tokens: of an answer; the run's own limit by default.
            samples: answers a prompt.
            seed: of sampling.
            hidden: experts to leave out: the router sees their stand-ins, or without these nothing in their place.
            stop: texts that end an answer, in addition to the run's own.

        Raises:
            ValueError: when a prompt is too long, no expert has such a name, or a stop string is empty.
        """
        asked = self._prompts(prompts)
        if unknown := set(hidden) - set(self.names):
            raise ValueError(f"no expert is called {min(unknown)!r}: there are {', '.join(self.names)}")
        if len(set(hidden)) == len(self.names):
            raise ValueError("the router must see at least one expert; `compare` shows the policy alone")
        if not asked:
            return []
        limit = max_new_tokens or self.opened.config.sampling.max_new_tokens
        known = self.policy.stand_ins
        places = [self.names.index(name) for name in hidden if name not in known]
        stand_ins = {self.names.index(name): known[name] for name in hidden if name in known}
        stops = tuple(dict.fromkeys((*self.opened.config.sampling.stop, *([stop] if isinstance(stop, str) else stop))))
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        sampling = Sampling(temperature=temperature, max_new_tokens=limit, samples=samples, stop=stops)
        encoded = [_without_answers(part) if part.expert in hidden else part for part in self._encoded(asked)]
        self.policy.check_room(self.policy.messages_for(asked, encoded), limit)
        self.policy.seed = seed
        made = self.policy.generate(
            asked,
            sampling,
            self.opened.trained.snapshot,
            *encoded,
            training=False,
            hidden=places,
            stand_ins=stand_ins,
        )
        return [self._answer(group, tuple(hidden)) for group in made.groups]

    def compare(self, prompts: Asked | Sequence[Asked], *, max_new_tokens: int | None = None) -> list[Compared]:
        """Greedy answers, beside those of the policy without prefix (and without adapter) and of each expert alone.

        Encoders, which cannot answer, are left out.
        """
        asked = self._prompts(prompts)
        limit = max_new_tokens or self.opened.config.sampling.max_new_tokens
        answers = self.generate([prompt.messages for prompt in asked], max_new_tokens=limit)
        stop = self.opened.config.sampling.stop
        sampling = Sampling(temperature=0.0, max_new_tokens=limit, samples=1, stop=stop)
        alone = self.policy.generate(asked, sampling, self.opened.trained.snapshot, training=False, alone=True).groups
        messages = [prompt.messages for prompt in asked]
        able = [expert for expert in self.experts if not expert.frozen.is_encoder]
        said = {expert.config.name: expert.answer(messages, limit, stop) for expert in able}
        return [
            Compared(answer, group.completions[0].text, {name: mine[row] for name, mine in said.items()})
            for row, (answer, group) in enumerate(zip(answers, alone, strict=True))
        ]

    @property
    def names(self) -> list[str]:
        """The experts' names, in the router's order."""
        return list(self.opened.shape.experts)

    def close(self) -> None:
        """Ends the engines."""
        self._built.close()

    def __enter__(self) -> Musketeers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prompts(self, prompts: Asked | Sequence[Asked]) -> list[Prompt]:
        several: Any = [prompts] if isinstance(prompts, str) or _is_message(prompts) else prompts
        return [
            Prompt(
                ordinal=row,
                task="",
                messages=self.opened.messages(each) if isinstance(each, str) else tuple(each),
                answer="",
            )
            for row, each in enumerate(several)
        ]

    def _encoded(self, prompts: Sequence[Prompt]) -> list[Encoded]:
        messages, rows = [prompt.messages for prompt in prompts], list(range(len(prompts)))
        if self.policy.asks == "states":
            return [expert.encode(messages) for expert in self.experts]
        if self.policy.asks == "answers":
            tokens = answer_tokens(self.opened.config)
            return [expert.answers(messages, rows, tokens) for expert in self.experts]
        return []

    def _answer(self, group: Group, hidden: tuple[str, ...]) -> Answer:
        first = group.completions[0]
        shares = group.attention.mean(axis=0) if group.attention.size else np.zeros(len(self.names))
        return Answer(
            text=first.text,
            texts=tuple(completion.text for completion in group.completions),
            finish=first.finish.value,
            tokens=len(first.tokens),
            attention=dict(zip(self.names, map(float, shares), strict=True)),
            gate=bool(group.prefix_hash),
            hidden=hidden,
        )


def refuse_other(what: str, found: str, trained: str) -> None:
    """Refuses a model that is not the one the router was trained with.

    Raises:
        RouterError: naming it.
    """
    if found != trained:
        raise RouterError(
            f"{what} is another model than the router was trained with (fingerprint {found[:12]}, not {trained[:12]}): "
            "give the same weights, tokenizer, chat template and wording of prompts, or train again"
        )


def _without_answers(part: Encoded) -> Encoded:
    """Of an expert that is not to be listened to; where it gave states, the router does not look at them."""
    return replace(part, answers=("",) * len(part.answers))


def _is_message(prompts: Any) -> bool:
    """Whether these prompts are one conversation."""
    return bool(prompts) and isinstance(prompts[0], Mapping)
