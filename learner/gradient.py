"""d loss / d prefix of one rank's groups, micro-batch by micro-batch through the frozen policy.

The router makes the prefixes once and their graph is cut here: any number of micro-batches
accumulate into one gradient, and the policy never holds more than one micro-batch's activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from experts.adapter import Arrays
from experts.loading import FrozenModel
from learner.advantages import has_signal
from learner.algorithms import ALGORITHMS, GRPO, LossTerms, TokenBatch
from learner.batch import micro_batches, targets
from learner.config import KLConfig
from learner.logprobs import completion_logprobs
from learner.losses import Denominators
from learner.token_logprobs import TokenStatistics
from rollout.sequence import CompletionBatch, PrefixPosition, lay_out_completions, lay_out_prompts
from rollout.types import Group

Prefix = Float[Tensor, "groups slots width"]


@dataclass
class Sums:
    """Additive metrics: sums over micro-batches and ranks; `tokens` and `completions` count the valid ones."""

    values: dict[str, float] = field(default_factory=dict)
    mismatch_max: float = 0.0

    def add(self, **amounts: float) -> None:
        """Adds amounts by name."""
        for name, amount in amounts.items():
            self.values[name] = self.values.get(name, 0.0) + amount

    @classmethod
    def merged(cls, parts: Sequence[Sums]) -> Sums:
        """The sums of several ranks."""
        total = cls()
        for part in parts:
            total.add(**part.values)
            total.mismatch_max = max(total.mismatch_max, part.mismatch_max)
        return total

    def mean(self, name: str, per: str = "tokens") -> float:
        """A sum per valid token, or per valid completion."""
        return self.values.get(name, 0.0) / max(self.values.get(per, 0.0), 1.0)


@dataclass(frozen=True)
class Adapters:
    """Values of the policy's adapter other than the present ones.

    version: the present one.  old: by version, of the routers that sampled the groups.  initial: before training.
    """

    version: int = 0
    old: Mapping[int, Arrays] = field(default_factory=dict)
    initial: Arrays = field(default_factory=dict)

    def of(self, groups: Sequence[Group]) -> Arrays | None:
        """Of groups of one version; None where that is the present one."""
        return self.old.get(groups[0].router.version)


NO_ADAPTERS = Adapters()


class PrefixGradient:
    """Runs the frozen policy forwards and backwards for the groups of one rank.

    Args:
        kl: how the KL is measured.  Groups without signal whose KL is not in the loss add exactly nothing to
            the gradient: they are not computed, and the metrics leave them out.
        seed: of the draw that says whose KL is measured, where it is not everybody's.
        checkpoint_activations: see `LearnerConfig`.
    """

    def __init__(
        self,
        policy: FrozenModel,
        algorithm: GRPO,
        position: PrefixPosition,
        microbatch_tokens: int,
        kl: KLConfig,
        seed: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        self.policy, self.algorithm, self.position = policy, algorithm, position
        self.checkpoint_activations = checkpoint_activations
        self.microbatch_tokens, self.kl, self.seed = microbatch_tokens, kl, seed
        self.penalised = kl.coefficient > 0 and kl.reference != "none"

    def __call__(
        self,
        groups: Sequence[Group],
        prefix: Prefix,
        old_prefix: Prefix | None,
        initial_prefix: Prefix | None,
        denominators: Denominators,
        measure_kl: bool = True,
        adapters: Adapters = NO_ADAPTERS,
    ) -> tuple[Prefix, Sums]:
        """The gradient of these groups' share of the loss, and their metrics.

        Args:
            prefix: of the router being trained; its graph is not touched.
            old_prefix: of the routers that sampled the groups, or None where that is the same router.
            initial_prefix: of the router before training, when it is the KL reference.
            measure_kl: also when it is not in the loss.
            adapters: of the policy; what the loss says of the present one is left in its parameters' gradients.
        """
        gradient, sums = torch.zeros_like(prefix), Sums()
        measured = [(self.penalised or measure_kl) and self._is_measured(group) for group in groups]
        # Without a prefix, nothing that this router does changes a completion's chance.
        wanted = [
            i
            for i, group in enumerate(groups)
            if (group.draws.open or self.policy.adapter) and ((self.penalised and measured[i]) or self._teaches(group))
        ]
        for rows in self._micro_batches(groups, wanted, prefix.shape[1]):
            leaf = prefix[rows].detach().requires_grad_(True)
            old = None if old_prefix is None else old_prefix[rows]
            initial = None if initial_prefix is None else initial_prefix[rows]
            known = [measured[i] for i in rows]
            loss = self._loss([groups[i] for i in rows], leaf, old, initial, known, denominators, sums, adapters)
            sums.add(operations=self._operations([groups[i] for i in rows], known, prefix.shape[1], old is not None))
            if loss.requires_grad:
                loss.backward()
            if leaf.grad is not None:
                gradient[rows] = leaf.grad
        return gradient, sums

    def _loss(
        self,
        groups: Sequence[Group],
        leaf: Prefix,
        old_prefix: Prefix | None,
        initial: Prefix | None,
        measured: list[bool],
        denominators: Denominators,
        sums: Sums,
        adapters: Adapters,
    ) -> Tensor:
        slots, temperature = leaf.shape[1], groups[0].sampling.temperature
        old, found = None, None
        # Before the graph exists that needs the adapter's present values.
        with torch.no_grad():
            if old_prefix is not None:
                with self._holding(adapters.of(groups)):
                    old = self._statistics(groups, old_prefix, slots, temperature)[0].logprobs
            if any(measured):
                found = self._reference(groups, initial, measured, adapters)
        statistics, completions = self._statistics(groups, leaf, slots, temperature)
        now = statistics.logprobs.detach()
        old = now if old is None else old
        reference = None if found is None else _measured_only(found, measured, now)
        target = targets(groups, completions)
        batch = TokenBatch(statistics.logprobs, old, target.sampler, reference, target.rewards, target.ok, target.valid)
        terms = self.algorithm.loss(batch, denominators)
        _count(sums, batch, statistics, terms)
        if reference is not None:
            counted = target.valid & torch.tensor(measured, device=leaf.device).repeat_interleave(
                len(target.valid) // len(groups)
            ).unsqueeze(1)
            sums.add(kl=torch.where(counted, terms.kl, 0.0).sum().item(), kl_tokens=counted.sum().item())
        return terms.loss

    def _operations(self, groups: Sequence[Group], measured: Sequence[bool], slots: int, stale: bool) -> float:
        """Of the policy: 2 a parameter and token forwards, as many backwards, where only inputs get a gradient."""
        known = 0 if self.kl.reference == "no_prefix" else 1  # the reference reads a prefix too
        passed = 0
        for group, asked in zip(groups, measured, strict=True):
            own = slots if group.draws.open else 0
            tokens = len(group.prompt_tokens) + sum(
                len(c.tokens) for c in {id(c): c for c in group.completions}.values()
            )
            passed += (3 if stale else 2) * (own + tokens) + asked * (known * own + tokens)
        return 2.0 * self.policy.parameters * passed

    def _micro_batches(self, groups: Sequence[Group], wanted: list[int], slots: int) -> Iterator[list[int]]:
        """Places of groups that go through the policy together; with an adapter, those of one version."""
        versions = {groups[i].router.version for i in wanted} if self.policy.adapter else {None}
        for version in sorted(versions, key=str):
            mine = [i for i in wanted if version is None or groups[i].router.version == version]
            for batch in micro_batches([groups[i] for i in mine], slots, self.microbatch_tokens):
                yield [mine[i] for i in batch]

    def _reference(
        self, groups: Sequence[Group], initial: Prefix | None, measured: list[bool], adapters: Adapters
    ) -> Tensor:
        """The reference's log-probabilities of the groups that are measured."""
        chosen = [i for i, asked in enumerate(measured) if asked]
        some = [groups[i] for i in chosen]
        prefix = None if initial is None else initial[chosen]
        slots = 0 if prefix is None else prefix.shape[1]
        adapter = self.policy.adapter
        if adapter is None:
            context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        elif self.kl.reference == "initial_router":
            context = adapter.holding(adapters.initial)
        else:
            context = adapter.off()
        with context:
            return self._statistics(some, prefix, slots, groups[0].sampling.temperature)[0].logprobs

    def _holding(self, values: Arrays | None) -> contextlib.AbstractContextManager[None]:
        adapter = self.policy.adapter
        return contextlib.nullcontext() if adapter is None or values is None else adapter.holding(values)

    def _teaches(self, group: Group) -> bool:
        # An algorithm of the user's own may find something in groups whose rewards are all the same.
        if type(self.algorithm) not in ALGORITHMS.values():
            return True
        return has_signal([score.reward for score in group.scores], [score.status for score in group.scores])

    def _is_measured(self, group: Group) -> bool:
        if self.kl.reference == "none":
            return False
        drawn = xxhash.xxh3_64_intdigest(f"{self.seed}|{group.ordinal}|kl".encode()) / 2**64
        return drawn < self.kl.share

    def _statistics(
        self, groups: Sequence[Group], prefix: Prefix | None, slots: int, temperature: float
    ) -> tuple[TokenStatistics, CompletionBatch]:
        device, pad_id = self.policy.device, self.policy.pad_id
        shown = torch.tensor([g.draws.open for g in groups])[:, None].expand(-1, slots)
        tokens = [g.prompt_tokens for g in groups]
        prompts = lay_out_prompts(tokens, slots, pad_id, self.position, shown, device)
        completions = lay_out_completions(prompts, [[c.tokens for c in g.completions] for g in groups], pad_id)
        saving = self.checkpoint_activations
        return completion_logprobs(self.policy, prompts, prefix, completions, temperature, saving), completions


def _measured_only(found: Tensor, measured: list[bool], logprobs: Tensor) -> Tensor:
    """The reference's log-probabilities; of groups that are not measured the policy's own: KL and gradient 0."""
    chosen = [i for i, asked in enumerate(measured) if asked]
    reference = logprobs.clone()
    by_group = reference.view(len(measured), -1, reference.shape[1])
    by_group[chosen, :, : found.shape[1]] = found.view(len(chosen), -1, found.shape[1])
    return reference


def _count(sums: Sums, batch: TokenBatch, statistics: TokenStatistics, terms: LossTerms) -> None:
    valid = batch.valid
    mismatch = torch.where(valid, (batch.old - batch.sampler).abs(), 0.0)
    sums.mismatch_max = max(sums.mismatch_max, mismatch.max().item())
    sums.add(
        loss=terms.loss.item(),
        tokens=valid.sum().item(),
        completions=valid.any(dim=1).sum().item(),
        entropy=torch.where(valid, statistics.entropy, 0.0).sum().item(),
        clipped=terms.clipped.sum().item(),
        clipped_completions=terms.clipped.any(dim=1).sum().item(),
        corrected=terms.corrected.sum().item(),
        kl_clamped=terms.kl_clamped.sum().item(),
        mismatch=mismatch.sum().item(),
        ratio=torch.where(valid, terms.ratio, 0.0).sum().item(),
    )
