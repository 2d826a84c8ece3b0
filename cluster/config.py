"""A run's configuration: YAML plus `key=value` overrides, assembled from the sections of each package."""

from __future__ import annotations

import datetime
import difflib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from experts.chat import PromptStyle, Wording
from experts.config import CacheConfig, EngineConfig, ExpertConfig, RouterConfig
from learner.config import AlgorithmConfig, LearnerConfig
from rewards.composed import wordings
from rewards.config import DataConfig, RewardsConfig
from rollout.config import PolicyConfig, SamplingConfig
from rollout.text import unknown_fields

FROZEN = ConfigDict(frozen=True, extra="forbid")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what to do."""


class EvaluationConfig(BaseModel):
    """What is measured, on held-out prompts, with greedy decoding.

    prompts: held-out test prompts a task, before and after training.
    validation_prompts, every: validation prompts a task, every so many steps; 0 switches it off.
    stand_ins: training prompts whose states are tried in the place of each expert's, after training and on validation
        prompts, for when it is away; 0 looks for none.
    router_examples: training prompts a task that the route-and-answer classifier learns from.
    cache: folder that keeps the frozen baselines' results, so that equal models on equal prompts are measured
        once; null measures them in every run.
    """

    model_config = FROZEN
    seed: int = 0
    prompts: int = Field(200, ge=1)
    validation_prompts: int = Field(50, ge=1)
    every: int = Field(0, ge=0)
    stand_ins: int = Field(8, ge=0)
    router_examples: int = Field(300, ge=1)
    batch: int = Field(100, ge=1)
    cache: str | None = "~/.cache/n-musketeers/baselines"


class CheckpointConfig(BaseModel):
    """Checkpoints: every so many steps, how many are kept, and whether each step's groups are (for replay)."""

    model_config = FROZEN
    every: int = Field(100, ge=1)
    keep: int = Field(3, ge=1)
    groups: bool = True


Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]


class PlacementConfig(BaseModel):
    """On how few or how many nodes the workers of a role start: `pack` takes few, `spread` many; `strict_pack` takes
    one and `strict_spread` one a worker, or waits.  Workers that ask for no CPU and no GPU are packed or spread only.
    """

    model_config = FROZEN
    experts: Strategy = "pack"
    policy: Strategy = "spread"
    learner: Strategy = "pack"


class RayConfig(BaseModel):
    """How the run meets Ray.

    address: of a running cluster; None starts one on loopback, with the dashboard on.
    dashboard_port: of a cluster that is started here; None takes 8265, or the next one that is free.
    deadline_s: limit of every remote wait; past it the worker that is stuck is named, with its stack, and
        started again.
    warning_s: after this much of a wait the same is said, once, and nothing is done yet.
    start_deadline_s: the same for workers that load models.
    gpu_memory_gb: of every GPU, for the memory plan; None asks the machines.
    placement: packed or spread, by role.
    """

    model_config = FROZEN
    address: str | None = None
    dashboard_port: int | None = Field(None, ge=1, le=65535)
    deadline_s: float = Field(600.0, gt=0)
    warning_s: float = Field(60.0, gt=0)
    start_deadline_s: float = Field(900.0, gt=0)
    gpu_memory_gb: float | None = Field(None, gt=0)
    placement: PlacementConfig = PlacementConfig()


class TrackingConfig(BaseModel):
    """Where a run's metrics go beside its own folder, TensorBoard and Prometheus.

    wandb: a project of Weights & Biases (`pip install wandb`); None sends nothing anywhere.
    """

    model_config = FROZEN
    wandb: str | None = None


class PipelineConfig(BaseModel):
    """How prompts flow; `max_staleness` says how far ahead of the learner.

    prompts_per_call: that go through experts, policy and verifiers together; None takes
        `learner.groups` over `policy.workers`.
    calls_per_worker: that a rollout worker holds at once, one at work and the others waiting; further prompts
        wait in the driver and start under a newer router.
    open_groups: prompts started and not yet ended; None leaves the limit to `max_staleness`.
    buffer_mb: finished groups that wait for their update.
    attempts: failures with nothing else under way after which a prompt is given up.
    max_restarts: of one worker without a success in between; one more stops the run.
    """

    model_config = FROZEN
    prompts_per_call: int | None = Field(None, ge=1)
    calls_per_worker: int = Field(2, ge=1)
    open_groups: int | None = Field(None, ge=1)
    buffer_mb: float = Field(1024.0, gt=0)
    attempts: int = Field(3, ge=1)
    max_restarts: int = Field(5, ge=0)


class RunConfig(BaseModel):
    """Everything a run depends on.

    run: name of the run's folder under `root`.
    root: a folder, or a URL such as `s3://bucket/runs` that every checkpoint is copied to (with fsspec, which needs the
        package of that kind of storage).
    seed: of training (router's start, sampling, expert dropout); zoo, data and evaluation have their own.
    steps: updates of the router.
    max_staleness: S; no group is trained more than S updates after the router that produced it, and
        rollouts run ahead by as much; 0 is synchronous training.
    threads: torch threads a worker; 0 shares the machine's cores among the workers of a stage.
    """

    model_config = FROZEN
    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    root: str = "runs"
    seed: int = 0
    steps: int = Field(ge=1)
    execution: Literal["ray", "inline"] = "ray"
    max_staleness: int = Field(2, ge=0)
    threads: int = Field(0, ge=0)
    data: DataConfig
    experts: tuple[ExpertConfig, ...]
    cache: CacheConfig = CacheConfig()
    router: RouterConfig = RouterConfig()
    policy: PolicyConfig
    sampling: SamplingConfig = SamplingConfig()
    rewards: RewardsConfig = RewardsConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    pipeline: PipelineConfig = PipelineConfig()
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _choices(self) -> RunConfig:
        if self.router.gate is None:
            self.__dict__["router"] = self.router.model_copy(update={"gate": self.gate_by_itself})
        if self.algorithm.choice_after is None:
            after = {"choice_after": self.choice_after_by_itself}
            self.__dict__["algorithm"] = self.algorithm.model_copy(update=after)
        return self

    @property
    def gate_by_itself(self) -> bool:
        """What `router.gate` is where nobody says."""
        return self.router.kind == "perceiver" and not self.algorithm.dynamic_sampling

    @property
    def choice_after_by_itself(self) -> int:
        """What `algorithm.choice_after` is where nobody says."""
        router = self.router
        taught = router.kind == "top1" or router.init or router.warm_start.steps
        return self.steps // 3 if router.gate and not taught else 0

    @model_validator(mode="after")
    def _cross_checks(self) -> RunConfig:
        names = [expert.name for expert in self.experts]
        if not names:
            raise ValueError("experts is empty: name at least one expert")
        if len(set(names)) != len(names):
            raise ValueError(f"experts holds a name twice: {names}")
        if self.execution == "inline" and (
            max(self.learner.ranks, self.policy.workers, self.rewards.workers, *(e.replicas for e in self.experts)) > 1
        ):
            raise ValueError(
                "execution: inline runs in one process: set learner.ranks, policy.workers, rewards.workers and the "
                "experts' replicas to 1"
            )
        if unknown := unknown_fields(self.router.text.template, names):
            raise ValueError(
                f"router.text.template: {{{unknown[0]}}} is neither {{prompt}} nor {{answers}} nor one of the experts "
                f"{', '.join(names)}"
            )
        self._check_new_experts(names)
        self._check_parts()
        if self.algorithm.dynamic_sampling and (self.router.gate or self.router.kind == "top1"):
            raise ValueError(
                "algorithm.dynamic_sampling drops the groups that tell a router's choices apart, right or wrong: "
                "set it to false, or do without router.gate and kind: top1"
            )
        limit = self.pipeline.open_groups
        if limit is not None and limit < self.learner.groups:
            raise ValueError(
                f"pipeline.open_groups {limit} is less than learner.groups {self.learner.groups}: no update could form"
            )
        return self

    def _check_new_experts(self, names: Sequence[str]) -> None:
        new = self.router.add_expert
        if strange := [name for name in new if name not in names]:
            raise ValueError(f"router.add_expert: {strange[0]!r} is none of the experts {', '.join(names)}")
        if new and len(new) == len(names):
            raise ValueError(
                "router.add_expert names every expert: those of the router of router.init must be there too"
            )
        if new and self.policy.lora is not None:
            raise ValueError(
                "router.add_expert trains what belongs to the new experts alone, and policy.lora an adapter: choose one"
            )

    def _check_parts(self) -> None:
        for index, expert in enumerate(self.experts):
            key = f"experts.{index}.parts"
            known = [task.name for task in self.data.tasks]
            if unknown := [name for name in expert.parts if name not in known]:
                raise ValueError(f"{key}: {unknown[0]!r} is none of data.tasks: {', '.join(known)}")
            if expert.parts and "{question}" not in (expert.template or ""):
                raise ValueError(f"{key}: experts.{index}.template must say where: give it one with {{question}}")
            places: dict[str, list[bool]] = {}
            for message, _, parts in wordings(self.data) if expert.parts else ():
                own = [part in expert.parts for part in parts]
                if places.setdefault(message, own) != own:
                    raise ValueError(
                        f"{key}: two composed tasks have the same wording and other parts, so that nobody can tell "
                        f"whose question is which ({', '.join(parts)}): give one of them a template of its own"
                    )

    @property
    def trains(self) -> bool:
        """Whether there is anything to train; a run without is measured only."""
        return self.policy.lora is not None or self.router.kind not in ("none", "text")

    @property
    def prompts_per_call(self) -> int:
        """Prompts that go through the stages together."""
        share = -(-self.learner.groups // self.policy.workers)
        return min(self.pipeline.prompts_per_call or share, self.learner.groups)

    @property
    def folder(self) -> Path:
        """The run's folder; of a root that is a URL, the one on this machine that is copied there."""
        return (staging(self.root) if is_url(self.root) else Path(self.root).expanduser()) / self.run

    def models(self) -> dict[str, str]:
        """Configuration key -> model reference, the policy included."""
        found = {f"experts.{index}.model": expert.model for index, expert in enumerate(self.experts)}
        return {**found, "policy.model": self.policy.model}

    def engines(self) -> dict[str, EngineConfig]:
        """Configuration key -> how a frozen model runs, the policy included."""
        found: dict[str, EngineConfig] = {f"experts.{index}": expert for index, expert in enumerate(self.experts)}
        return {**found, "policy": self.policy}

    @property
    def prompt_style(self) -> PromptStyle:
        """What is the same for all prompts of the run."""
        own = tuple(Wording(*each) for each in wordings(self.data))
        return PromptStyle(self.data.date, self.data.template, own)

    def dated(self, date: datetime.date | None) -> RunConfig:
        """The configuration with this date, unless it has one."""
        if self.data.date is not None:
            return self
        return self.model_copy(update={"data": self.data.model_copy(update={"date": date})})

    def as_yaml(self) -> str:
        """The resolved configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def is_url(root: str) -> bool:
    """Whether a run's root is a URL that fsspec understands, and not a path."""
    return "://" in root


def staging(root: str) -> Path:
    """Where the driver writes the runs of a URL: in `MUSKETEERS_STAGING`, else ~/.cache/n-musketeers/runs."""
    base = Path(os.environ.get("MUSKETEERS_STAGING") or "~/.cache/n-musketeers/runs").expanduser()
    return base / hashlib.sha256(root.rstrip("/").encode()).hexdigest()[:12]


OTHER_NAMES = {"policy.replicas": "policy.workers"}  # keys that a recipe may call otherwise


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and applies `key=value` overrides (list items by index: `experts.0.model=...`).

    Raises:
        ConfigError: one line, naming the file or key and the remedy.
    """
    if not Path(path).is_file():
        raise ConfigError(f"there is no configuration file {str(path)!r}")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{path} must hold keys and values at its top level")
    return _overridden(tree, overrides, str(path))


def changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A resolved configuration with overrides.

    Raises:
        ConfigError: as `load`.
    """
    return _overridden(OmegaConf.create(config.model_dump(mode="json")), overrides, "the overrides")


def _overridden(tree: Any, overrides: Sequence[str], where: str) -> RunConfig:
    overrides = [_renamed(override) for override in overrides]
    for name, key in OTHER_NAMES.items():
        section, _, last = name.rpartition(".")
        some = OmegaConf.select(tree, section)
        if OmegaConf.is_dict(some) and last in some and OmegaConf.select(tree, key) is None:
            OmegaConf.update(tree, key, some.pop(last))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        try:
            _put(tree, key, yaml.load(value, _WithoutDates))
        except IndexError as error:
            raise ConfigError(f"override {override!r} cannot be applied: {error}") from error
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"override {override!r} cannot be applied: {' '.join(str(error).split())}") from error
    return parse(OmegaConf.to_container(tree, resolve=True), where, overrides)


class _WithoutDates(yaml.SafeLoader):
    """Reads dates as text, as OmegaConf does."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - yaml's own name
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _renamed(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{OTHER_NAMES.get(key, key)}{equals}{value}"


def _put(tree: Any, key: str, value: Any) -> None:
    """Sets one key; the index after a list's last adds an item to it."""
    parts = key.split(".")
    for at in range(1, len(parts)):
        some, index = OmegaConf.select(tree, ".".join(parts[:at])), parts[at]
        if not OmegaConf.is_list(some) or not index.isdecimal() or int(index) < len(some):
            continue
        if index != str(len(some)) or at + 1 < len(parts):
            name = ".".join(parts[:at])
            raise IndexError(f"{name} has {len(some)} items, from 0; {name}.{len(some)}={{...}} adds one")
        some.append(value)
        return
    OmegaConf.update(tree, key, value, force_add=True)


def parse(values: Any, where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration from plain data.

    where, overrides: what an error names: the override that set the key, or else where the others are from.

    Raises:
        ConfigError: as `load`.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
        more = f" (and {len(others)} more)" if others else ""
        key = ".".join(map(str, first["loc"]))
        set_by = [each for each in overrides if key and each.partition("=")[0] == key]
        place = f"override {set_by[-1]!r}" if set_by else where
        raise ConfigError(f"{place}: {_explain(first)}{more}") from error


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _keys_beside(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys there: {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    if error["type"] == "missing":
        return f"missing key {key!r}: give it a value"
    message, value = error["msg"].removeprefix("Value error, "), error.get("input")
    if error["type"] != "value_error" and isinstance(value, str | int | float | None):
        message += f", not {value!r}"
    return f"{key}: {message}" if key else message


def _keys_beside(loc: Sequence[str | int]) -> list[str]:
    """Field names of the model that an unknown key was found in."""
    model: Any = RunConfig
    for part in loc[:-1]:
        if isinstance(part, int) or not hasattr(model, "model_fields"):
            continue
        annotation = model.model_fields[part].annotation
        inner = [a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")]
        model = inner[0] if inner else annotation
    return list(getattr(model, "model_fields", {}))
