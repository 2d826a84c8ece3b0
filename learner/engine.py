"""The only module that knows DeepSpeed: an engine that holds the router and nothing else.

One forward, one backward, one step per update and rank.  DeepSpeed averages gradients over ranks;
`backward` multiplies by the number of ranks, because our losses already carry global denominators.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experts.state import Arrays
from learner.compiled import drop_stale_lock
from learner.config import LearnerConfig
from learner.schedule import learning_rate

STATE_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """Adam's state in full float32 arrays by parameter name, whatever the number of ranks.

    steps: optimizer steps taken.
    """

    steps: int
    moments: dict[str, Arrays]


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one learner meet."""

    rank: int = 0
    world: int = 1
    host: str = "127.0.0.1"
    port: int = 0


def import_deepspeed() -> Any:
    """DeepSpeed, told where it is; the first call in a process takes seconds."""
    # It calls `ninja` by name; pip put that beside the interpreter.
    beside, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != beside:
        os.environ["PATH"] = os.pathsep.join([beside, path])
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        drop_stale_lock()
    import deepspeed

    return deepspeed


def init_ranks(place: Rendezvous) -> None:
    """Joins the process group, once a process; gloo on CPU, NCCL on GPUs."""
    deepspeed = import_deepspeed()
    alone = place.world == 1
    if alone or (not torch.cuda.is_available() and place.host.startswith("127.")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(place.world),
        MASTER_ADDR=place.host,
        MASTER_PORT=str(place.port or free_port()),
    )
    if not torch.distributed.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if alone:
            # Ranks that meet by address listen on every interface, for anyone: one rank has nobody to meet.
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # torch exports it by `import *`
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def trains(router: nn.Module) -> bool:
    """Whether there is anything to train."""
    return any(parameter.requires_grad for parameter in router.parameters())


class RouterEngine:
    """DeepSpeed around the router: ZeRO 0 to 2, float32, AdamW, gradient clipping.

    Parameters that need no gradient stand still: the optimizer does not hold them, nor does a state its moments.

    total_steps: of the whole run, which the learning rate's schedule needs.
    """

    def __init__(self, router: nn.Module, config: LearnerConfig, total_steps: int) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        self.config, self.total_steps = config, total_steps
        self._steps = 0
        trained = [parameter for parameter in router.parameters() if parameter.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=router, model_parameters=trained, config=self._settings())
        self.world = torch.distributed.get_world_size()

    def _settings(self) -> dict[str, Any]:
        c = self.config
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": c.clip,
            "zero_optimization": {"stage": c.zero_stage, "overlap_comm": False},
            "optimizer": {
                "type": "AdamW",
                "params": {
                    "lr": c.learning_rate,
                    "betas": list(c.betas),
                    "weight_decay": c.weight_decay,
                    "torch_adam": True,
                    "fused": True,
                },
            },
            "steps_per_print": 10**9,
        }

    @property
    def module(self) -> nn.Module:
        """The router itself."""
        return self.engine.module

    def __call__(self, *inputs: Any) -> Any:
        """The router's forward, through the engine."""
        return self.engine(*inputs)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters with their names, without those that stand still."""
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]

    def backward(self, prefix: Tensor, gradient: Tensor, more: Tensor | None = None) -> None:
        """Carries d loss / d prefix through the router; afterwards gradients are summed over ranks.

        more: a loss of the router's own.

        Gradients of a backward that no step followed do not count.
        """
        if self.config.zero_stage == 0:
            self.module.zero_grad()
        loss = (prefix * gradient.to(prefix.dtype)).sum()
        self.engine.backward((loss if more is None else loss + more) * self.world)

    def gradients(self) -> Arrays:
        """Raw gradients before clipping, between backward and step (for tests and replay)."""
        from deepspeed.utils import safe_get_full_grad

        return {name: _array(safe_get_full_grad(p)) for name, p in self._trained()}

    def step(self) -> float:
        """One optimizer step; returns the gradient's norm before clipping."""
        rate = learning_rate(self.config, self._steps + 1, self.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        norm = self._norm() if self.config.zero_stage == 0 else None
        self.engine.step()
        self._steps += 1
        return float(norm if norm is not None else self.engine.optimizer._global_grad_norm)

    def _norm(self) -> float:
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])).item()

    def optimised(self) -> list[nn.Parameter]:
        """What the optimizer holds."""
        return [parameter for group in self.engine.optimizer.param_groups for parameter in group["params"]]

    def optimizer_state(self) -> OptimizerState:
        """Gathered from all ranks (every rank must call)."""
        moments: dict[str, Arrays] = {key: {} for key in STATE_KEYS}
        if self._steps:
            for name, parameter in self._trained():
                for key in STATE_KEYS:
                    moments[key][name] = _array(self._get_state(parameter, key))
        return OptimizerState(self._steps, moments)

    def load(self, arrays: Arrays, state: OptimizerState) -> None:
        """Restores weights and optimizer, whatever number of ranks or ZeRO stage wrote them.

        Nothing of this engine's own past stays: neither moments nor the gradients of an update that was broken off.
        """
        self._materialise_state()
        for name, parameter in self.module.named_parameters():
            self._set_weight(parameter, _tensor(arrays[name], parameter))
        for name, parameter in self._trained():
            for key in STATE_KEYS:
                moment = state.moments[key][name] if state.steps else np.zeros(parameter.shape, np.float32)
                self._set_state(parameter, key, _tensor(moment, parameter))
        self._steps = state.steps
        self._set_step_counts(state.steps)

    def _materialise_state(self) -> None:
        """Adam's state exists after a first step only: take one that changes nothing."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0
        zero = sum((p * 0.0).sum() for _, p in self._trained())
        self.engine.backward(zero)
        self.engine.step()

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _set_step_counts(self, steps: int) -> None:
        for entry in self._base_optimizer().state.values():
            if "step" in entry:
                entry["step"] = torch.full_like(entry["step"], steps)

    def _get_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self.config.zero_stage == 0:
            return self.engine.optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.config.zero_stage == 0:
            self.engine.optimizer.state[parameter][key].copy_(value)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(value)
        if self.config.zero_stage and parameter.requires_grad:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)


class Untrained(RouterEngine):
    """In the place of `RouterEngine` for a collaborator without parameters, which is only measured."""

    def __init__(self, router: nn.Module) -> None:
        self._router = router

    @property
    def module(self) -> nn.Module:
        """See `RouterEngine.module`."""
        return self._router

    def optimised(self) -> list[nn.Parameter]:
        """Nothing."""
        return []

    def optimizer_state(self) -> OptimizerState:
        """Nothing."""
        return OptimizerState(0, {})

    def load(self, arrays: Arrays, state: OptimizerState) -> None:
        """There is nothing to restore."""


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy().copy()


def _tensor(array: np.ndarray, like: Sequence[Any] | Tensor) -> Tensor:
    return torch.from_numpy(np.array(array)).to(like.device)  # type: ignore[union-attr]
