"""A LoRA adapter on the frozen policy: the one thing beside a router that may train, and only where it is asked for.

The model's own weights never change.  The adapter's values travel with the router's in one snapshot.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save
from torch import Tensor, nn

ADAPTER = "adapter."  # before the names of an adapter's arrays in a snapshot
MARK = ".lora_"  # in the names of its parameters in a model
Arrays = dict[str, np.ndarray]


class AdapterError(ValueError):
    """An adapter that does not fit its model."""


class LoraConfig(BaseModel):
    """A LoRA adapter of the policy (arXiv 2106.09685), trained together with the router.

    rank, alpha: its product of two matrices counts alpha / rank times; None takes twice the rank.
    targets: names of the linear layers that get one; None takes all but the output layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: int = Field(8, ge=1, le=512)
    alpha: float | None = Field(None, gt=0.0)
    targets: tuple[str, ...] | None = None

    @property
    def scale(self) -> float:
        """alpha, with its default."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def for_peft(self) -> Any:
        """As peft has it."""
        import peft

        targets: Any = "all-linear" if self.targets is None else list(self.targets)
        return peft.LoraConfig(r=self.rank, lora_alpha=self.scale, target_modules=targets, task_type="CAUSAL_LM")


class Adapter:
    """An adapter inside a transformers model.

    Args:
        model: gets the adapter's layers in place.  Its own parameters stay as they are, frozen.
        seed: of the start; the adapter's product is zero then, whatever the seed.

    Raises:
        AdapterError: when no layer has one of the configured names.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, seed: int) -> None:
        import peft

        self.config, self._off = config, False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                # Through a wrapper, which knows the output layer and leaves it out.
                self._model = peft.get_peft_model(model, config.for_peft())
            except ValueError as error:
                raise AdapterError(f"policy.lora.targets: {str(error).splitlines()[0]}") from error
        self.parameters = {name: p for name, p in model.named_parameters() if MARK in name}
        self._held: str | None = None

    def initial(self) -> dict[str, Tensor]:
        """Copies of the present values by name; zeros where the model has shapes alone."""
        return {n: torch.zeros(p.shape) if p.is_meta else p.detach().clone() for n, p in self.parameters.items()}

    def put(self, values: Mapping[str, np.ndarray | Tensor]) -> None:
        """Takes these values."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.as_tensor(values[name]))

    def take_gradients(self) -> dict[str, Tensor]:
        """What backward passes have left, which is gone afterwards."""
        found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        return found

    @contextlib.contextmanager
    def holding(self, values: Mapping[str, np.ndarray | Tensor]) -> Iterator[None]:
        """Other values for the block; no graph of the present ones may wait for its backward."""
        present = self.initial()
        self.put(values)
        try:
            yield
        finally:
            self.put(present)

    def off(self) -> contextlib.AbstractContextManager[None]:
        """The model as it was without an adapter, for the block."""
        return self._model.disable_adapter()


def as_parameters(values: Mapping[str, Tensor]) -> nn.ParameterDict:
    """An adapter's values as parameters of a router's module; a name there has no dots."""
    return nn.ParameterDict({name.replace(".", "|"): nn.Parameter(value.cpu()) for name, value in values.items()})


def by_name(parameters: nn.ParameterDict) -> dict[str, Tensor]:
    """The parameters under the names that they have in the model."""
    return {name.replace("|", "."): parameter for name, parameter in parameters.items()}


def adapter_arrays(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """The adapter's part of a snapshot, under the names that it has in the model."""
    return {n.removeprefix(ADAPTER).replace("|", "."): a for n, a in arrays.items() if n.startswith(ADAPTER)}


def write_adapter(folder: Path, arrays: Arrays, config: LoraConfig, model: str) -> None:
    """An adapter as peft and vLLM read it.

    arrays: as of `adapter_arrays`.  model: that it belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.for_peft().to_dict() | {"base_model_name_or_path": model, "inference_mode": True}
    names = {name: "base_model.model." + name.replace(".default.weight", ".weight") for name in arrays}
    if settings["target_modules"] == "all-linear":
        settings["target_modules"] = sorted({name.split(MARK)[0].rpartition(".")[2] for name in arrays})
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=1, default=str) + "\n")
    contents = {names[name]: np.ascontiguousarray(array) for name, array in arrays.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(contents))
