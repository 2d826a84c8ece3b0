"""One rank of the learner: a frozen policy copy and DeepSpeed's engine around the router.

The order of an update: rebuild every group's prefix from what the rollout used, refuse what does
not match, run the frozen policy for d loss / d prefix, then one backward and one step of the router.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experts.adapter import MARK, Adapter, LoraConfig, adapter_arrays, by_name
from experts.config import RouterConfig
from experts.expert import Encoded
from experts.joining import train_only
from experts.loading import load_frozen, weights_sha256
from experts.operations import RouterOperations, states_of
from experts.prefix import sketch
from experts.router import chooses
from experts.selfcheck import require
from experts.state import (
    Arrays,
    RouterShape,
    RouterSnapshot,
    build_router,
    put_arrays,
    stack_features,
    take_arrays,
)
from learner.algorithms import build_algorithm
from learner.batch import global_denominators
from learner.choices import CHOICE_CLIP, Choices, choice_loss
from learner.config import AlgorithmConfig, LearnerConfig
from learner.engine import OptimizerState, Rendezvous, RouterEngine, Untrained, init_ranks, trains
from learner.fresh import Fresh, calibrated, joined, warmed
from learner.gradient import Adapters, PrefixGradient, Sums
from learner.losses import Denominators
from learner.selfcheck import check_learner
from rollout.types import Group, Rollout

# Of a prefix rebuilt from features that may have been made again in another batch, relative to its size: in half
# precision a prompt's states depend on its batch (measured: prefixes differ by 0.3 % with bfloat16 experts).
SKETCH_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
ROUNDING = 2e-6
KL_EVERY = 10  # updates between looks at a KL that is not in the loss


class LearnerError(RuntimeError):
    """Groups that do not belong to this learner's routers."""


@dataclass(frozen=True, slots=True)
class LearnerState:
    """Everything a learner needs to go on: small, in full float32, independent of ranks and stage.

    history: the last S + 1 routers by version, the current one included; `initial` the first of all.
    """

    snapshot: RouterSnapshot
    optimizer: OptimizerState
    history: dict[int, RouterSnapshot]
    initial: Arrays


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """One rank's part of an update: metrics of its own groups, the whole gradient's norm, its own seconds."""

    sums: Sums
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class LearnerSpec:
    """What every rank is built from."""

    learner: LearnerConfig
    algorithm: AlgorithmConfig
    router: RouterConfig
    policy_path: str
    policy_dtype: str
    shape: RouterShape
    seed: int
    max_staleness: int
    steps: int
    threads: int = 0
    lora: LoraConfig | None = None
    experts_dtypes: tuple[str, ...] = ("float32",)
    self_check: bool = True


class LearnerRank:
    """A rank; all ranks get the same calls with the same groups and take their own share of them."""

    def __init__(self, spec: LearnerSpec, place: Rendezvous) -> None:
        if spec.threads:
            torch.set_num_threads(spec.threads)
        init_ranks(place)
        device = "cuda" if spec.learner.gpus and torch.cuda.is_available() else "cpu"
        self.spec, self.place = spec, place
        self.new_experts = [spec.shape.experts.index(name) for name in spec.router.add_expert]
        self.tolerance = max(SKETCH_TOLERANCE[dtype] for dtype in spec.experts_dtypes)
        self.policy = load_frozen(spec.policy_path, spec.policy_dtype, device, "policy", lora=spec.lora, seed=spec.seed)
        if spec.self_check:
            saving = spec.learner.checkpoint_activations
            found = check_learner(self.policy, spec.router.prefix.position, saving)
            require(found, spec.policy_path, "the learner's policy")
        router = build_router(spec.router, spec.shape, self.policy, spec.seed).to(device)
        if self.new_experts:
            train_only(router, self.new_experts)
        self.old_router = build_router(spec.router, spec.shape, self.policy, spec.seed).to(device).requires_grad_(False)
        self.engine = RouterEngine(router, spec.learner, spec.steps) if trains(router) else Untrained(router)
        self.gradient = PrefixGradient(
            self.policy,
            build_algorithm(spec.algorithm),
            spec.router.prefix.position,
            spec.learner.microbatch_tokens,
            spec.algorithm.kl,
            spec.seed,
            spec.learner.checkpoint_activations,
        )
        self.router_operations = RouterOperations(self.old_router, len(spec.shape.experts), device)
        self.version, self.incarnation = 0, 0
        # A replay on other ranks or threads rebuilds routers to the last bits only; the prefix is checked all the same.
        self.replaying = False
        self.initial = take_arrays(router)
        self.history = {0: RouterSnapshot.of(self.initial, 0, 0)}

    def __repr__(self) -> str:
        return f"Learner(rank {self.place.rank})"

    def ready(self) -> bool:
        """Answers once the rank is built."""
        return True

    def sha256(self) -> str:
        """Hash of this rank's policy copy as it is now."""
        return weights_sha256(self.policy.model)

    def trainable(self) -> dict[str, Any]:
        """What the optimizer holds, for the proof that only the router trains, or what is new of it."""
        optimised = sum(p.numel() for p in self.engine.optimised())
        own = [(name, p) for name, p in self.policy.model.named_parameters() if MARK not in name]
        grads = [name for name, p in own if p.requires_grad or p.grad is not None]
        router = sum(p.numel() for p in self.engine.module.parameters())
        return {"optimised": optimised, "router": router, "policy_with_gradient": grads}

    def snapshot(self) -> RouterSnapshot:
        """The current router."""
        return self.history[self.version]

    def state(self) -> LearnerState:
        """Gathered from all ranks: every rank must be called."""
        return LearnerState(self.snapshot(), self.engine.optimizer_state(), dict(self.history), self.initial)

    def moments(self) -> OptimizerState | None:
        """The optimizer's state, from rank 0 only; gathered from all ranks: every rank must be called."""
        state = self.engine.optimizer_state()
        return state if self.place.rank == 0 else None

    def restore(self, state: LearnerState, incarnation: int) -> None:
        """Goes on from a state; the incarnation tells its versions from those of a life before."""
        self.engine.load(state.snapshot.arrays, state.optimizer)
        self.version, self.incarnation, self.initial = state.snapshot.version, incarnation, state.initial
        self.history = dict(state.history)

    def start_from(self, arrays: Arrays) -> None:
        """Starts training from another router's weights, with a fresh optimizer."""
        put_arrays(self.engine.module, arrays)
        self.engine.load(arrays, OptimizerState(0, {}))
        self.version, self.initial = 0, dict(arrays)
        self.history = {0: RouterSnapshot.of(self.initial, 0, 0)}

    def calibrate(self, *features: Encoded) -> Fresh:
        """See `learner.fresh`; the rank itself stays as it is.

        One rank computes it and all start from it: eigenvectors may differ in the last bits between machines.
        """
        return calibrated(self._fresh_router(), features, self.spec.router)

    def add_experts(self, arrays: Arrays, *features: Encoded) -> Fresh:
        """See `learner.fresh`; the rank itself stays as it is."""
        return joined(self._fresh_router(arrays), features, self.new_experts, self.spec.router)

    def warm_start(self, arrays: Arrays, texts: Sequence[str], *features: Encoded) -> Fresh:
        """See `learner.fresh`; the rank itself stays as it is."""
        router, experts = self._fresh_router(arrays), len(self.spec.shape.experts)
        return warmed(router, experts, self.policy, texts, features, self.spec.router, self.spec.seed)

    def _fresh_router(self, arrays: Arrays | None = None) -> nn.Module:
        router = build_router(self.spec.router, self.spec.shape, self.policy, self.spec.seed)
        if arrays is not None:
            put_arrays(router, arrays)
        return router

    def update(self, ordinals: Sequence[int], *parts: Rollout | Encoded) -> UpdateResult:
        """One update on the groups of `ordinals`.

        Args:
            parts: scored rollouts that hold these groups, and the features that these were made from.
        """
        start = time.perf_counter()
        groups, features = select(ordinals, parts)
        denominators = global_denominators(groups, self.spec.algorithm.constant_length)
        mine = slice(self.place.rank, None, self.place.world)
        sums = self.backward(groups[mine], [rows[mine] for rows in features], denominators)
        norm = self.finish_update()
        return UpdateResult(sums, norm, time.perf_counter() - start)

    def finish_update(self) -> float:
        """The optimizer's step after `backward`; returns the gradient's norm before clipping."""
        norm = self.engine.step()
        self._advance()
        return norm

    def backward(
        self, groups: Sequence[Group], features: Sequence[Sequence[np.ndarray]], denominators: Denominators
    ) -> Sums:
        """Everything of an update before the optimizer's step."""
        device = self.policy.device
        stacked = stack_features(features, device)
        visible = torch.from_numpy(np.stack([g.draws.expert_mask for g in groups])).to(device)
        choices = Choices.of(groups, device) if chooses(self.engine.module) else None
        out = self.engine(stacked, visible, *([choices] if choices else []))
        prefix, adapter = out.prefix, self.policy.adapter
        if adapter is not None:
            adapter.put(by_name(self.engine.module.adapter))  # type: ignore[arg-type]
            adapter.take_gradients()
        measure_kl = self.gradient.penalised or self.version % KL_EVERY == 0
        with torch.no_grad():
            old = self._old_prefix(groups, stacked, visible, prefix, choices)
            wants_initial = measure_kl and self.gradient.kl.reference == "initial_router"
            initial = self._run_old(self.initial, stacked, visible, choices) if wants_initial else None
        gradient, sums = self.gradient(
            groups, prefix.detach(), old, initial, denominators, measure_kl, self._adapters(groups)
        )
        more = None if adapter is None else self._through_adapter(adapter)
        if choices is not None and out.options is not None:
            # Times 0 and not left out: DeepSpeed wants a gradient of every parameter.
            learns = self.version >= (self.spec.algorithm.choice_after or 0)
            loss = self._choice_loss(groups, out.options, choices, denominators, sums) * float(learns)
            more = loss if more is None else more + loss
        self.engine.backward(prefix, gradient, more)
        stale = sum(group.router.version != self.version for group in groups) / len(groups)
        passes = 1 + self._backward_passes() + stale + (initial is not None)
        sums.add(operations=passes * self.router_operations(states_of(features), len(groups)))
        return sums

    def _backward_passes(self) -> int:
        """What a backward pass of the router costs, in forward ones: one for inputs and one for weights."""
        if not trains(self.engine.module):
            return 0
        return 1 if self.new_experts else 2  # nearly all weights of a router that grows stay as they are

    def _adapters(self, groups: Sequence[Group]) -> Adapters:
        """Of the versions that sampled these groups, apart from the present one, and of the router before training."""
        if self.policy.adapter is None:
            return Adapters()
        stale = {group.router.version for group in groups} - {self.version}
        old = {version: adapter_arrays(self.history[version].arrays) for version in stale}
        return Adapters(self.version, old, adapter_arrays(self.initial))

    def _through_adapter(self, adapter: Adapter) -> Tensor:
        """A loss whose gradient is what the micro-batches have left in the policy's adapter."""
        found, masters = adapter.take_gradients(), by_name(self.engine.module.adapter)  # type: ignore[arg-type]
        return torch.stack([(masters[name] * gradient).sum() for name, gradient in found.items()]).sum()

    def _choice_loss(
        self, groups: Sequence[Group], options: Tensor, choices: Choices, denominators: Denominators, sums: Sums
    ) -> Tensor:
        """This rank's share of the mean over all groups."""
        bonus = self.spec.algorithm.choice_entropy
        mine = torch.tensor([denominators.group_advantages[g.ordinal] for g in groups], device=options.device)
        loss, entropy = choice_loss(options, choices, mine, CHOICE_CLIP, bonus)
        closed = float(sum(not group.draws.open for group in groups))
        sums.add(choices=float(len(groups)), choice_entropy=entropy, closed=closed)
        return loss / denominators.groups

    def _old_prefix(
        self,
        groups: Sequence[Group],
        features: list[Tensor],
        visible: Tensor,
        prefix: Tensor,
        choices: Choices | None = None,
    ) -> Tensor | None:
        """Prefixes of the routers that sampled these groups; None when that is the current router for all."""
        rebuilt = prefix.detach()
        stale = sorted({g.router.version for g in groups} - {self.version})
        for version in stale:
            if version not in self.history:
                raise LearnerError(
                    f"a group of router version {version} came at version {self.version}: older than kept"
                )
            rows = torch.tensor([g.router.version == version for g in groups], device=prefix.device)
            theirs = None if choices is None else choices[rows]
            made = self._run_old(self.history[version].arrays, [f[rows] for f in features], visible[rows], theirs)
            rebuilt = rebuilt.clone()
            rebuilt[rows] = made
        self._refuse_other_prefix(groups, rebuilt)
        return rebuilt if stale else None

    def _run_old(
        self, arrays: Arrays, features: list[Tensor], visible: Tensor, choices: Choices | None = None
    ) -> Tensor:
        put_arrays(self.old_router, arrays)
        return self.old_router(features, visible, *([choices] if choices else [])).prefix

    def _refuse_other_prefix(self, groups: Sequence[Group], rebuilt: Tensor) -> None:
        # Anchors are the same for every prompt and may dwarf what the router adds: only its own part sets the scale.
        anchors = getattr(self.engine.module, "anchors", None)
        common = 0.0 if anchors is None else sketch(anchors[None])[0]
        mine, slots = sketch(rebuilt), rebuilt.shape[1]
        theirs = np.stack(
            [g.prefix_sketch if len(g.prefix_sketch) == slots else np.full(slots, np.inf) for g in groups]
        )
        own, largest = np.abs(mine - common).max(axis=1, initial=0.0), np.abs(mine).max(axis=1, initial=0.0)
        limit = np.maximum(np.maximum(self.tolerance * own, ROUNDING * largest), 1e-15)
        close = (np.abs(mine - theirs) <= limit[:, None]).all(axis=1)
        close &= np.array([len(g.prefix_sketch) == slots for g in groups])
        for group, same in zip(groups, close, strict=True):
            known = self.history[group.router.version].checksum
            if not same or (group.router.checksum != known and not self.replaying):
                raise LearnerError(
                    f"prompt {group.ordinal}: its prefix does not match the one rebuilt from router version "
                    f"{group.router.version}, its features and its draws: the group is refused"
                )

    def _advance(self) -> None:
        self.version += 1
        self.history[self.version] = RouterSnapshot.of(take_arrays(self.engine.module), self.version, self.incarnation)
        for version in [v for v in self.history if v < self.version - self.spec.max_staleness]:
            del self.history[version]


def select(ordinals: Sequence[int], parts: Sequence[Rollout | Encoded]) -> tuple[list[Group], list[list[np.ndarray]]]:
    """The groups of some ordinals, in their order, and every expert's features of them."""
    by_ordinal: dict[int, Group] = {}
    by_key: dict[str, np.ndarray] = {}
    for part in parts:
        if isinstance(part, Rollout):
            by_ordinal |= {group.ordinal: group for group in part.groups}
        else:
            by_key |= dict(zip(part.keys, part.features, strict=True))
    groups = [by_ordinal[ordinal] for ordinal in ordinals]
    if missing := [group.ordinal for group in groups if not set(group.feature_keys) <= by_key.keys()]:
        raise LearnerError(f"prompt {missing[0]} came without the features it was sampled from: an expert has changed")
    experts = len(groups[0].feature_keys) if groups else 0
    return groups, [[by_key[group.feature_keys[expert]] for group in groups] for expert in range(experts)]
