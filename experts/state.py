"""The router's trainable state: built from its configuration, snapshotted for workers, saved to disk.

The router is the only thing that flows back from the learner; a snapshot is a few megabytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn

from experts.adapter import ADAPTER, as_parameters
from experts.config import RouterConfig
from experts.loading import FrozenModel
from experts.router import router_class

Arrays = dict[str, np.ndarray]
ROUTER_FILES = ("router.safetensors", "router.json")


class RouterError(ValueError):
    """A saved router that does not belong to these experts or this policy."""


@dataclass(frozen=True, slots=True)
class RouterShape:
    """What a router belongs to: the experts in order and the policy, by fingerprint.

    norms: of each expert's states, as configured.
    """

    experts: tuple[str, ...]
    widths: tuple[int, ...]
    layers: tuple[int, ...]
    expert_fingerprints: tuple[str, ...]
    policy_width: int
    policy_fingerprint: str
    embedding_rms: float
    norms: tuple[str, ...] = ()

    def of(self, names: Sequence[str]) -> RouterShape:
        """The same with only these experts, in this order."""
        at = [self.experts.index(name) for name in names]

        def chosen(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[index] for index in at) if values else ()

        experts, widths, layers = chosen(self.experts), chosen(self.widths), chosen(self.layers)
        prints, norms = chosen(self.expert_fingerprints), chosen(self.norms)
        return replace(self, experts=experts, widths=widths, layers=layers, expert_fingerprints=prints, norms=norms)

    def describe(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "experts": [
                {"name": n, "width": w, "layer": layer, "fingerprint": f}
                for n, w, layer, f in zip(self.experts, self.widths, self.layers, self.expert_fingerprints, strict=True)
            ],
            "policy": {"width": self.policy_width, "fingerprint": self.policy_fingerprint},
            "embedding_rms": self.embedding_rms,
        }


@dataclass(frozen=True, slots=True)
class RouterSnapshot:
    """One version of the trainable state, as it travels: float32 arrays by parameter name."""

    version: int
    incarnation: int
    checksum: str
    arrays: Arrays

    @classmethod
    def of(cls, arrays: Arrays, version: int, incarnation: int) -> RouterSnapshot:
        """A snapshot with its checksum."""
        return cls(version, incarnation, checksum(arrays), arrays)


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Fast hash over names, shapes and bytes, in name order."""
    digest = xxhash.xxh3_128()
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def embedding_rms(policy: FrozenModel) -> float:
    """Root mean square of the policy's token embeddings as it reads them: Gemma's are scaled on their way in."""
    tokens = torch.arange(policy.model.get_input_embeddings().weight.shape[0], device=policy.device)
    squares = [policy.embed(some).double().pow(2).mean(dim=1) for some in tokens.split(8192)]
    return torch.cat(squares).mean().sqrt().item()


def build_router(config: RouterConfig, shape: RouterShape, policy: FrozenModel, seed: int = 0) -> nn.Module:
    """A fresh router, with the policy's adapter if it has one; the same seed gives the same weights always."""
    kind = router_class(config.kind)
    anchors = None
    if config.prefix.init == "anchored":
        anchors = policy.embed(torch.tensor(config.prefix.anchor_tokens, device=policy.device)).float().cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # A router of your own need not know of learned norms unless a run asks for them.
        learned = tuple(norm == "learned" for norm in shape.norms)
        reads = getattr(kind, "asks", "states") == "states"
        extra = {"learned_norms": learned} if any(learned) and reads else {}
        router = kind(config, shape.widths, shape.policy_width, shape.embedding_rms, anchors, **extra)
    if policy.adapter is not None:
        router.adapter = as_parameters(policy.adapter.initial())
    return router


def take_arrays(router: nn.Module) -> Arrays:
    """A copy of the router's state as float32 arrays."""
    return {name: tensor.detach().cpu().float().numpy().copy() for name, tensor in router.state_dict().items()}


def put_arrays(router: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Loads arrays into a router in place.

    Raises:
        RouterError: when they belong to a router of another make.
    """
    try:
        router.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise RouterError(
            f"these weights are those of a router with other settings, or of another version: {said}"
        ) from error


def save_router(folder: Path, snapshot: RouterSnapshot, shape: RouterShape, config: RouterConfig) -> None:
    """Writes `router.safetensors` and `router.json`."""
    meta = {
        "version": snapshot.version,
        "incarnation": snapshot.incarnation,
        "checksum": snapshot.checksum,
        "config": config.model_dump(mode="json"),
        **shape.describe(),
    }
    write_router(folder, snapshot.arrays, meta)


def write_router(folder: Path, arrays: Arrays, meta: Mapping[str, Any]) -> None:
    """Writes weights and then `router.json`, which makes them a router."""
    weights, described = (folder / name for name in ROUTER_FILES)
    folder.mkdir(parents=True, exist_ok=True)
    # Not `save_file`, whose error on a full disk is no OSError.
    weights.write_bytes(save(dict(arrays)))
    described.write_text(json.dumps(meta, indent=2) + "\n")


def read_router(folder: Path) -> tuple[RouterSnapshot, dict[str, Any]]:
    """A saved router, whatever it belongs to, and its `router.json`.

    Raises:
        RouterError: naming the file that is missing or damaged.
    """
    weights, described = (folder / name for name in ROUTER_FILES)
    for path in (described, weights):  # an interrupted export has no router.json
        if not path.is_file():
            raise RouterError(f"{folder} holds no router: {path.name} is missing")
    try:
        meta = json.loads(described.read_text())
        arrays = load_file(weights)
        snapshot = RouterSnapshot(meta["version"], meta["incarnation"], meta["checksum"], arrays)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RouterError(f"router {folder}: its files are damaged ({error}): copy them again") from error
    if checksum(arrays) != snapshot.checksum:
        raise RouterError(f"router {folder}: router.safetensors does not match its checksum: copy it again")
    return snapshot, meta


def load_router(folder: Path, shape: RouterShape, config: RouterConfig) -> RouterSnapshot:
    """Reads a saved router that must belong to these experts, this policy and this architecture.

    Raises:
        RouterError: naming what differs, or the file that is missing or damaged.
    """
    snapshot, meta = read_router(folder)
    refuse_others(folder, meta, shape)
    for key in ("kind", "width", "latents", "heads", "feedforward"):
        if meta["config"][key] != getattr(config, key):
            raise RouterError(
                f"router {folder}: saved with router.{key} {meta['config'][key]}, not {getattr(config, key)}"
            )
    for key in ("gate", "null_expert"):
        if (had := bool(meta["config"].get(key))) != bool(getattr(config, key)):
            raise RouterError(f"router {folder}: saved with router.{key} {had}, not {not had}")
    return snapshot


def fitted(saved: Arrays, fresh: Arrays, where: str) -> Arrays:
    """A saved router's arrays for a run whose fresh ones are these: an adapter that only one of them has is left out or
    starts anew.

    Raises:
        RouterError: naming what has another shape.
    """
    for name, array in fresh.items():
        if name in saved and saved[name].shape != array.shape:
            raise RouterError(f"router {where}: {name} is {saved[name].shape} there and {array.shape} here")
        if name not in saved and not name.startswith(ADAPTER):
            raise RouterError(f"router {where}: it has no {name}")
    if unknown := [name for name in saved if name not in fresh and not name.startswith(ADAPTER)]:
        raise RouterError(f"router {where}: it has a {unknown[0]}, and a router of these settings has none")
    return {name: saved.get(name, array) for name, array in fresh.items()}


def refuse_others(folder: Path | str, meta: Mapping[str, Any], shape: RouterShape) -> None:
    """Refuses a saved router that was trained with other experts or another policy; `meta` is its `router.json`.

    Raises:
        RouterError: naming what differs.
    """
    mine = shape.describe()
    saved_names = [expert["name"] for expert in meta["experts"]]
    if saved_names != list(shape.experts):
        raise RouterError(f"router {folder} belongs to experts {saved_names}, not {list(shape.experts)}")
    for saved, here in zip(meta["experts"], mine["experts"], strict=True):
        for key in ("width", "layer", "fingerprint"):
            if saved[key] != here[key]:
                raise RouterError(
                    f"router {folder}: expert {saved['name']!r} has another {key} now ({here[key]}, not {saved[key]})"
                )
    for key in ("width", "fingerprint"):
        if meta["policy"][key] != mine["policy"][key]:
            raise RouterError(f"router {folder} belongs to another policy: its {key} is {meta['policy'][key]}")


def stack_features(features: Sequence[Sequence[np.ndarray]], device: Any = "cpu") -> list[torch.Tensor]:
    """Per expert a list of (tokens, width) arrays -> per expert a (batch, tokens, width) tensor.

    Shorter ones stand at the end, behind rows of zeros, which a router leaves out.
    """
    return [torch.from_numpy(_padded(list(rows))).to(device) for rows in features]


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return np.stack(rows)
    padded = np.zeros((len(rows), longest, rows[0].shape[-1]), dtype=rows[0].dtype)
    for index, row in enumerate(rows):
        padded[index, longest - len(row) :] = row
    return padded
