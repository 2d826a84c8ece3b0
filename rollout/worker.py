"""The rollout worker: a frozen policy, the current router, and prompts turned into groups."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experts.chat import ChatSettings
from experts.config import RouterConfig
from experts.expert import Encoded, whole
from experts.loading import load_embeddings, load_frozen
from experts.operations import RouterOperations, states_of
from experts.prefix import prefix_hash, sketch
from experts.router import chooses, closed_choice
from experts.selfcheck import Finding, check_tokenizer, require
from experts.standins import stood_in
from experts.state import RouterShape, RouterSnapshot, build_router, embedding_rms, put_arrays, stack_features
from rollout.config import PolicyConfig
from rollout.draws import choice_uniform, collaborator_draws, request_seed, token_uniforms
from rollout.engine import PolicyEngine, Request, TransformersEngine
from rollout.operations import Operations
from rollout.selfcheck import check_policy
from rollout.text import cut, with_answers
from rollout.types import Completion, Draws, Group, Message, Prompt, Rollout, RouterStamp, Sampling


class Made(NamedTuple):
    """What a collaborator makes for some prompts.

    prefix: (prompts, slots, width), or None where there are no slots.  attention: (prompts, latents, experts).
    draws: with the router's choices, if it takes any.
    """

    prefix: Tensor | None
    attention: np.ndarray | None
    draws: list[Draws]


class RolloutWorker:
    """Generates groups; holds one policy copy and at most one router version at a time.

    date: see `ChatSettings`.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        path: str,
        router: RouterConfig,
        seed: int,
        index: int = 0,
        threads: int = 0,
        date: datetime.date | None = None,
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.index, self.seed, self.router_config = index, seed, router
        self.engine: PolicyEngine
        if policy.engine == "vllm":
            from rollout.vllm import VllmPolicyEngine

            self.policy = load_embeddings(path, policy.dtype, "policy", policy.lora)
            self.engine = VllmPolicyEngine(
                self.policy, policy, router.prefix.position, threads, self.engine_died, seed + index
            )
        else:
            device = "cuda" if policy.gpus and torch.cuda.is_available() else "cpu"
            self.policy = load_frozen(path, policy.dtype, device, "policy", lora=policy.lora)
            self.engine = TransformersEngine(self.policy, router.prefix.position)
        self.policy = replace(self.policy, chat_settings=ChatSettings(policy.chat_template_kwargs, date))
        self._embedding_rms = embedding_rms(self.policy)
        self._router: torch.nn.Module | None = None
        self._experts: tuple[str, ...] = ()
        self._stamp: RouterStamp | None = None
        # Calls come from several threads where the engine batches over them; the router belongs to one at a time.
        self._router_lock = threading.Lock()
        self._longest = policy.max_model_tokens
        if policy.self_check:
            with contextlib.ExitStack() as built:
                built.callback(self.close)
                require(self.self_check(), path, "the policy")
                built.pop_all()

    def __repr__(self) -> str:
        return f"Rollout({self.index})"

    def engine_died(self) -> None:
        """Called when an engine in a process of its own is gone; calls to the worker fail from then on."""

    def ready(self) -> bool:
        """Answers once the worker is built."""
        return True

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()

    def self_check(self) -> list[Finding]:
        """See `experts.selfcheck`."""
        found = check_tokenizer(self.policy)
        return [*found, *check_policy(self.engine, self._embedding_rms, self._longest)]

    def info(self) -> dict[str, Any]:
        """Width, parameters and fingerprints of the policy, for the router's shape and the run's summary."""
        return {
            "name": "policy",
            "width": self.policy.width,
            "parameters": self.policy.parameters,
            "fingerprint": self.policy.fingerprint(),
            "date": self.policy.chat.date,
            "embedding_rms": self._embedding_rms,
            "sha256": self.sha256(),
        }

    def sha256(self) -> str:
        """Hash of the policy's weights as they are now."""
        return self.engine.sha256()

    def attach(self, shape: RouterShape) -> None:
        """Builds the router's module once the experts' widths are known."""
        self._router = build_router(self.router_config, shape, self.policy).to(self.policy.device)
        self._router.requires_grad_(False)
        self._operations = RouterOperations(self._router, len(shape.experts), self.policy.device)
        self._experts, self._stamp = shape.experts, None

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, snapshot: RouterSnapshot, *encoded: Encoded
    ) -> tuple[Rollout, int]:
        """`generate` for training, and the number of tokens: a few bytes that say the worker is free."""
        rollout = self.generate(prompts, sampling, snapshot, *encoded)
        return rollout, rollout.tokens

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        snapshot: RouterSnapshot,
        *encoded: Encoded,
        training: bool = True,
        alone: bool = False,
        hidden: Sequence[int] = (),
        stand_ins: Mapping[int, np.ndarray] = MappingProxyType({}),
        prefix: np.ndarray | None = None,
    ) -> Rollout:
        """One group a prompt, all under the snapshot's router.

        encoded: every expert's features of these prompts, in the router's order, or answers, which the policy then
            reads in its prompt; none at all where the router asks for nothing.
        training: draws expert dropout; evaluation shows the router every expert.
        alone: the frozen policy without anything that is trained.
        hidden: experts, by place, that the router is not to see.
        stand_ins: (tokens, width) states in the place of what an expert has read, by the expert's place.
        prefix: (slots, width) for every prompt that gets one, in the place of the router's own; no slots, no prefix.
        """
        start = time.perf_counter()
        encoded = tuple(
            stood_in(part, stand_ins[place]) if place in stand_ins else part
            for place, part in enumerate(whole(encoded))
        )
        dropout, experts = self.router_config.expert_dropout if training else 0.0, len(self._experts)
        draws = [collaborator_draws(self.seed, p.ordinal, snapshot.version, experts, dropout) for p in prompts]
        for mine in draws:
            mine.expert_mask[list(hidden)] = False
        uniforms = [choice_uniform(self.seed, p.ordinal, snapshot.version) for p in prompts] if training else None
        made = Made(None, None, draws) if alone else self.collaborate(snapshot, encoded, draws, uniforms)
        if prefix is not None:
            same = torch.from_numpy(prefix).to(self.policy.device).expand(len(prompts), -1, -1)
            made = made._replace(prefix=same if len(prefix) else None)
        tokens = [np.asarray(self.policy.tokenize(m), dtype=np.int64) for m in self.messages_for(prompts, encoded)]
        requests = [
            self._request(prompt, mine, drawn.open, sampling, snapshot)
            for prompt, mine, drawn in zip(prompts, tokens, made.draws, strict=True)
        ]
        completions = self.engine.generate(requests, made.prefix, sampling, None if alone else snapshot)
        groups = self._groups(prompts, tokens, completions, sampling, snapshot, encoded, made)
        sampled = sum(len(c.tokens) for group in completions for c in group)
        return Rollout(
            groups,
            sampled,
            hits=sum(e.hits for e in encoded),
            misses=sum(e.misses for e in encoded),
            seconds=time.perf_counter() - start,
            encode_s=max((e.seconds for e in encoded), default=0.0),
            operations=Operations(
                sum(e.operations for e in encoded),
                sum(e.cold for e in encoded),
                2.0 * self.policy.parameters * (sampled + sum(map(len, tokens)) + _slots(made))
                + (0.0 if alone else self._routers(encoded, len(prompts))),
            ),
            cut=tuple(e.cut for e in encoded),
        )

    @torch.inference_mode()
    def mean_prefix(self, prompts: Sequence[Prompt], snapshot: RouterSnapshot, *encoded: Encoded) -> np.ndarray:
        """(slots, width) mean of these prompts' prefixes, of those that get one."""
        draws = [Draws(expert_mask=np.ones(len(self._experts), dtype=bool)) for _ in prompts]
        made = self.collaborate(snapshot, tuple(whole(encoded)), draws)
        given = [row for row, mine in enumerate(made.draws) if mine.open]
        if made.prefix is None or not given:
            return np.zeros((0, self.policy.width), np.float32)
        return made.prefix[given].float().mean(dim=0).cpu().numpy()

    def _groups(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[np.ndarray],
        completions: Sequence[Sequence[Completion]],
        sampling: Sampling,
        snapshot: RouterSnapshot,
        encoded: Sequence[Encoded],
        made: Made,
    ) -> tuple[Group, ...]:
        stamp = RouterStamp(version=snapshot.version, incarnation=snapshot.incarnation, checksum=snapshot.checksum)
        norms = self._rms_ratios(made.prefix, made.draws)
        prefix, attention, draws = made
        return tuple(
            Group(
                prompt=prompt,
                prompt_tokens=tokens[i],
                completions=tuple(completions[i]),
                sampling=sampling,
                router=stamp,
                draws=draws[i],
                prefix_hash=prefix_hash(prefix[i]) if prefix is not None and draws[i].open else "",
                prefix_sketch=sketch(prefix[i : i + 1])[0] if prefix is not None else np.zeros(0, np.float32),
                prefix_rms_ratio=norms[i],
                feature_keys=tuple(e.keys[i] for e in encoded if e.keys),
                attention=attention[i] if attention is not None else np.zeros((0, 0), np.float32),
            )
            for i, prompt in enumerate(prompts)
        )

    def collaborate(
        self,
        snapshot: RouterSnapshot,
        encoded: Sequence[Encoded],
        draws: list[Draws],
        uniforms: Sequence[float] | None = None,
    ) -> Made:
        """What the snapshot's router makes of some prompts' features.

        draws: one a prompt, with the experts it may see.
        uniforms: one a prompt, to sample a router's choices by; without, it takes the most likely ones.
        """
        with self._router_lock:
            if self._router is None:
                raise RuntimeError("generate was called before attach: the router's shape is not known")
            stamp = RouterStamp(version=snapshot.version, incarnation=snapshot.incarnation, checksum=snapshot.checksum)
            if stamp != self._stamp:
                put_arrays(self._router, snapshot.arrays)
                self._stamp = stamp
            features = stack_features([e.features for e in encoded if e.features], self.policy.device)
            visible = torch.from_numpy(np.stack([d.expert_mask for d in draws])).to(self.policy.device)
            choice = Choice(uniforms)
            out = self._router(features, visible, choice) if chooses(self._router) else self._router(features, visible)
            if out.options is not None:
                draws = choice.noted(draws, out.options, closed_choice(self._router, out.options))
        # "No prefix" means no slots at all.
        prefix = out.prefix if out.prefix.shape[1] else None
        return Made(prefix, out.attention.mean(dim=1).float().cpu().numpy(), draws)

    def _routers(self, encoded: Sequence[Encoded], prompts: int) -> float:
        """Floating-point operations of these prompts' prefixes."""
        return float(self._operations(states_of([e.features for e in encoded if e.features]), prompts))

    def messages_for(self, prompts: Sequence[Prompt], encoded: Sequence[Encoded]) -> list[Sequence[Message]]:
        """What the policy reads."""
        if not any(e.answers for e in encoded):
            return [prompt.messages for prompt in prompts]
        text, chat = self.router_config.text, self.policy.chat
        template, most = text.template, text.max_new_tokens

        def fitting(answer: str) -> str:
            return answer if most is None else cut(answer, chat, most)

        said = [{e.expert: fitting(e.answers[row]) for e in encoded} for row in range(len(prompts))]
        return [with_answers(template, p.messages, mine) for p, mine in zip(prompts, said, strict=True)]

    def _request(
        self, prompt: Prompt, tokens: np.ndarray, shown: bool, sampling: Sampling, snapshot: RouterSnapshot
    ) -> Request:
        seed = request_seed(self.seed, prompt.ordinal, snapshot.version)
        return Request(tokens, self._uniforms(prompt, snapshot, sampling), seed, shown)

    def _uniforms(self, prompt: Prompt, snapshot: RouterSnapshot, sampling: Sampling) -> np.ndarray | None:
        if sampling.temperature == 0 or not self.engine.needs_uniforms:
            return None
        return token_uniforms(self.seed, prompt.ordinal, snapshot.version, sampling.samples, sampling.max_new_tokens)

    def _rms_ratios(self, prefix: Tensor | None, draws: Sequence[Draws]) -> list[float]:
        if prefix is None:
            return [0.0] * len(draws)
        found = (prefix.float().pow(2).mean(dim=(1, 2)).sqrt() / self._embedding_rms).tolist()
        return [ratio if mine.open else 0.0 for ratio, mine in zip(found, draws, strict=True)]


def _slots(made: Made) -> int:
    """Of all prompts together."""
    return 0 if made.prefix is None else made.prefix.shape[1] * sum(mine.open for mine in made.draws)


class Choice:
    """A router's choices for some prompts: sampled by these draws in [0, 1), or the most likely ones without."""

    def __init__(self, uniforms: Sequence[float] | None) -> None:
        self._uniforms = uniforms

    def __call__(self, logprobs: Tensor) -> Tensor:
        """(batch, options) log-probabilities to (batch,) choices."""
        if self._uniforms is None:
            self.taken = logprobs.argmax(dim=-1)
        else:
            cumulative = logprobs.double().exp().cumsum(dim=-1)
            target = torch.tensor(self._uniforms, dtype=torch.float64, device=logprobs.device)[:, None]
            places = torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True)[:, 0]
            self.taken = places.clamp_max(logprobs.shape[-1] - 1)
        return self.taken

    def noted(self, draws: Sequence[Draws], logprobs: Tensor, closed: int) -> list[Draws]:
        """The draws with the choices in them."""
        chances = logprobs.gather(1, self.taken[:, None])[:, 0].tolist()
        return [
            replace(mine, choice=choice, choice_logprob=chance, open=choice != closed)
            for mine, choice, chance in zip(draws, self.taken.tolist(), chances, strict=True)
        ]
