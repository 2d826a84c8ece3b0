"""The `data` and `rewards` sections of the configuration."""

from __future__ import annotations

import datetime
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FROZEN = ConfigDict(frozen=True, extra="forbid")
_FUNCTION = re.compile(r"[\w.]+:\w+")


class AnswerRange(BaseModel):
    """Keep only entries whose integer answer lies in [min, max], nearly balanced by value.

    `balance` is the exponent of the sampling weight: a value that makes up a share f of the raw
    entries is drawn with weight f ** balance, so 1 keeps the natural frequencies and 0 makes every
    value equally likely.
    """

    model_config = FROZEN
    min: int
    max: int
    balance: float = Field(1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> AnswerRange:
        if self.min > self.max:
            raise ValueError(f"answers.min is {self.min}, above answers.max, {self.max}")
        return self


class ColumnsConfig(BaseModel):
    """Which columns of a file or data set hold the question and the answer.

    marker: the gold answer is what follows its last occurrence; None takes the whole column.
    """

    model_config = FROZEN
    question: str = "question"
    answer: str = "answer"
    marker: str | None = "####"


class RewardTerm(BaseModel):
    """One addend of a task's reward.

    kind: `answer` = the task's verifier; `format` = 1 when `pattern` is found in the completion; `length` = 1 up to
        `characters`, falling linearly to 0 at twice as many; or your own `module:function`, called with completion
        and prompt.
    weight: may be negative.  The reward is the weighted sum, not divided by the weights.
    """

    model_config = FROZEN
    kind: str
    weight: float = 1.0
    pattern: str = r"<answer>.*</answer>"
    characters: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _known(self) -> RewardTerm:
        if self.kind not in ("answer", "format", "length") and not _FUNCTION.fullmatch(self.kind):
            raise ValueError(f"rewards: {self.kind!r} is neither answer, format, length nor module:function")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rewards: pattern {self.pattern!r} is no regular expression: {error}") from error
        return self


class CurriculumConfig(BaseModel):
    """Automatic difficulty: training starts at the first level and moves on as answers get right.

    levels: of the data set's curriculum, from easy to hard.  Held-out prompts come from all of them at any time.
    raise_at: share of right answers, over the last `window` prompts of the present level, from which the next one is
        taken up; at `lower_at` and below it is the one before.
    """

    model_config = FROZEN
    levels: tuple[int, ...] = Field(min_length=2)
    raise_at: float = Field(0.7, gt=0.0, le=1.0)
    lower_at: float = Field(0.05, ge=0.0, lt=1.0)
    window: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> CurriculumConfig:
        if sorted(set(self.levels)) != list(self.levels) or self.levels[0] < 0:
            raise ValueError(f"curriculum.levels must rise from 0 or above, got {list(self.levels)}")
        if self.lower_at >= self.raise_at:
            raise ValueError(f"curriculum.lower_at {self.lower_at} must be below raise_at {self.raise_at}")
        return self


GLIMPSE = 100  # entries
SOURCES = ("dataset", "category", "compose", "path", "hub", "plugin")


class TaskConfig(BaseModel):
    """One task of the mixture.

    Exactly one of `dataset` (a Reasoning Gym data set), `category` (all data sets of a Reasoning Gym category, each a
    task of its own named `<name>.<data set>`, sharing the weight), `compose` (names of other tasks, of whose integer
    answers `operation` makes one), `path` (a local JSON, JSONL, Parquet or CSV file), `hub` (a data set of the
    Hugging Face hub, as `name` or `name:configuration`) or `plugin` (`module:Class`) says where its prompts come from.

    weight: share of the training stream, relative to the other tasks; 0 keeps the task as a part
        of composed ones, unseen by itself.
    size: how many entries are generated, or at most read from a file, before splitting.  Held-out
        prompts are distinct; training prompts repeat as often as the source repeats them.
    config: the Reasoning Gym data set's own settings.
    level: of the data set's curriculum, which sets what `config` leaves open; None takes the data set's defaults.
    exclude: data sets that a category leaves out.
    curriculum: several levels instead of one, the harder ones once the easier ones are mastered; they share `size`.
    operation: of two or three tasks, `sum`, `difference` (the first minus all others) or `maximum`; of two, `larger`
        (`first`, `second` or `equal`); of one, its answer in another form: `words` (seven), `roman` (VII), `parity`
        (odd, even) or `sentence` (The answer is 7.).
    template: the task's own wording, in place of `data.template`; `{question}` is the question, and in a composed task
        `{part1}`, `{part2}`, `{part3}` are those of its parts, without "Problem 1:" and the request.
    columns: of a file or a data set of the hub.
    verifier: instead of the source's own: `number` (the final number, exactly), `math` (symbolic equality by
        math-verify), `integer` (nothing but the integer), `text` (the same text, apart from spaces and case), or
        `module:function`, called with completion and prompt.
    rewards: what the reward adds up from; none means the verifier's score alone.
    """

    model_config = FROZEN
    name: str
    weight: float = Field(1.0, ge=0.0)
    size: int = Field(12_000, ge=1)
    dataset: str | None = None
    category: str | None = None
    exclude: tuple[str, ...] = ()
    config: dict[str, Any] = Field(default_factory=dict)
    level: int | None = Field(None, ge=0)
    curriculum: CurriculumConfig | None = None
    answers: AnswerRange | None = None
    compose: tuple[str, ...] | None = None
    operation: Literal["sum", "difference", "maximum", "larger", "words", "roman", "parity", "sentence"] = "sum"
    template: str | None = None
    path: str | None = None
    hub: str | None = None
    columns: ColumnsConfig = ColumnsConfig()
    plugin: str | None = None
    verifier: str | None = None
    rewards: tuple[RewardTerm, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"task {self.name!r} needs exactly one of {', '.join(SOURCES)}; got {given or 'none'}")
        self._check_composition()
        for key, sources in _OF_SOURCES.items():
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True) and (
                given[0] not in sources
            ):
                raise ValueError(f"task {self.name!r}: {key} is for {' or '.join(sources)}; {given[0]} takes none")
        if self.curriculum is not None and self.level is not None:
            raise ValueError(f"task {self.name!r}: give level or curriculum, not both")
        if self.verifier is not None and self.verifier not in VERIFIERS and not _FUNCTION.fullmatch(self.verifier):
            raise ValueError(
                f"task {self.name!r}: verifier {self.verifier!r} is neither {', '.join(VERIFIERS)} nor module:function"
            )
        return self

    def _check_composition(self) -> None:
        parts = len(self.compose or ())
        if self.compose is not None and parts not in (counts := PARTS[self.operation]):
            others = [operation for operation in PARTS if parts in PARTS[operation]]
            remedy = f"; for {parts} set operation to {', '.join(others)}" if others else ""
            raise ValueError(
                f"task {self.name!r}: compose takes {' or '.join(map(str, counts))} tasks, got {parts} (operation: "
                f"{self.operation}){remedy}"
            )
        if self.compose is not None and self.operation in OF_TEXT and self.verifier in ("number", "math", "integer"):
            raise ValueError(
                f"task {self.name!r}: verifier {self.verifier} reads no answers of operation: {self.operation}: leave "
                "verifier out"
            )
        fields = ("{question}", *(f"{{part{number}}}" for number in range(1, parts + 1)))
        if self.template is not None:
            if "{question}" not in self.template and not (parts and all(each in self.template for each in fields[1:])):
                each = f" or {', '.join(fields[1:])}" if parts else ""
                raise ValueError(f"task {self.name!r}: template must contain {{question}}{each}")
            for unknown in set(re.findall(r"{part[0-9]+}", self.template)) - set(fields):
                raise ValueError(
                    f"task {self.name!r}: template has {unknown}, but compose names {parts or 'no'} tasks; known are "
                    f"{', '.join(fields)}"
                )


VERIFIERS = ("number", "math", "integer", "text")
# Numbers of tasks that an operation takes.
PARTS: dict[str, tuple[int, ...]] = {
    "sum": (2, 3),
    "difference": (2, 3),
    "maximum": (2, 3),
    "larger": (2,),
    "words": (1,),
    "roman": (1,),
    "parity": (1,),
    "sentence": (1,),
}
OF_TEXT = ("larger", "words", "roman", "parity", "sentence")  # operations whose answers are no integers
_OF_SOURCES = {
    "operation": ("compose",),
    "template": ("dataset", "category", "compose", "path", "hub"),
    "config": ("dataset",),
    "level": ("dataset", "category"),
    "curriculum": ("dataset", "category"),
    "exclude": ("category",),
    "columns": ("path", "hub"),
}


class DataConfig(BaseModel):
    """Where prompts come from.

    seed: of every generated entry and of the stream's order; the training seed does not touch it.
    system: what stands in a system message in front of every prompt: one of Reasoning Gym's own (`default`, `simple`,
        `direct`, `DeepSeekZero`, `chain_of_draft`), or the path of a text file; None leaves it out.
    template: how a question becomes the prompt's text; `{question}` stands for it.
    date: that chat templates print which ask for today's, as YYYY-MM-DD; None takes the day on which the run is made.
        The run keeps it in its config.yaml, so that it reads the same prompts on every later day.
    max_prompt_tokens: prompts with more tokens, as the policy reads them, are left out (`long_prompts: drop`, said at
        the start of a run) or refused (`long_prompts: refuse`).
    validation, test: shares of the distinct prompts held out, by a hash of the prompt's text, so
        that no training of any kind (policy, experts, router) ever sees them.
    split_by: `entry` holds whole prompts out, so that a part of a held-out composed prompt may stand in a training
        prompt; `question` holds questions out, by a hash of their own text, in every task, alone and as parts: a
        composed prompt has parts of its own split only.
    """

    model_config = FROZEN
    seed: int = 1
    system: str | None = None
    template: str = "{question}\nAnswer:"
    date: datetime.date | None = None
    max_prompt_tokens: int | None = Field(None, ge=1)
    long_prompts: Literal["drop", "refuse"] = "drop"
    validation: float = Field(0.1, gt=0.0, lt=0.5)
    test: float = Field(0.15, gt=0.0, lt=0.5)
    split_by: Literal["entry", "question"] = "entry"
    tasks: tuple[TaskConfig, ...]

    def at_hand(self) -> tuple[TaskConfig, ...]:
        """The tasks whose prompts need no download."""
        away = {task.name for task in self.tasks if task.hub is not None}
        return tuple(t for t in self.tasks if t.name not in away and not away & set(t.compose or ()))

    def glimpse(self) -> DataConfig | None:
        """Enough of the prompts at hand to see that their settings are right; None where there are none at hand.

        Of data sets that are made, some: making all of a category's puzzles takes minutes.  But where only some of the
        answers or levels count, what is left of all of them is what matters.
        """
        parts = {part for task in self.tasks for part in task.compose or ()}
        tasks = []
        for task in self.at_hand():
            made = task.dataset is not None or task.category is not None
            whole = not made or task.answers or task.curriculum or task.name in parts
            tasks.append(task if whole else task.model_copy(update={"size": min(task.size, GLIMPSE)}))
        return self.model_copy(update={"tasks": tuple(tasks)}) if tasks else None

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("data.tasks is empty: name at least one task")
        if len(set(names)) != len(names):
            raise ValueError(f"data.tasks names a task twice: {sorted(n for n in set(names) if names.count(n) > 1)}")
        if not any(task.weight > 0 for task in self.tasks):
            raise ValueError("every task in data.tasks has weight 0: nothing to train on")
        for task in self.tasks:
            for part in task.compose or ():
                if part not in names or part == task.name:
                    raise ValueError(f"task {task.name!r} composes {part!r}, which is no other task in data.tasks")
        if "{question}" not in self.template:
            raise ValueError("data.template must contain {question}")
        return self


class RewardsConfig(BaseModel):
    """How answers are scored.

    workers: reward workers, each with up to `processes` scoring processes: one from the start, more when calls
        would wait for each other.
    binary_at: when set, a score of at least this counts as 1 and anything less as 0; 1 means right answers alone.  None
        trains on the score itself, of which 1 is right.  Floating-point sums may be 1e-9 below.
    timeout_s: limit for scoring ONE completion; past it the verifier's process is ended and the
        completion is masked, never scored zero.
    memory_mb: what a verifier may take beside its own data and what it has imported; past it Python raises MemoryError
        in it, the completion is masked, and the scoring process starts anew.
    on_timeout: `mask` leaves a completion that got no verdict in time out of the loss; `zero` scores it 0, for tasks
        whose answers make the verifier slow on purpose.  A verifier that fails masks in any case.
    masked_limit: a run stops, naming the verifier, when a task's share of masked completions is above
        this over its last groups (50 at least, 200 at most).
    unreadable_warning, unreadable_limit: shares of a task's completions over its last 200 groups that its verifier
        could not read, which are wrong answers: above the first a run says so, above the second it stops.
    jail: what confines scoring processes beside limits: `best_effort` takes what the kernel offers (Landlock, seccomp),
        `require` refuses to start where one of them is missing, `off` is for verifiers of your own that need files,
        programs or a network.
    jail_exempt: names of tasks whose verifiers run outside the jail, with this process's environment and folder.
    isolate: `process` scores one completion after another in a process, `completion` gives every one a process.
    reuse: completions that a process scores before another one replaces it.
    """

    model_config = FROZEN
    workers: int = Field(1, ge=1)
    processes: int = Field(2, ge=1)
    binary_at: float | None = 1.0
    timeout_s: float = Field(10.0, gt=0.0)
    memory_mb: float = Field(4096.0, gt=0.0)
    on_timeout: Literal["mask", "zero"] = "mask"
    masked_limit: float = Field(0.2, gt=0.0, le=1.0)
    unreadable_warning: float = Field(0.2, gt=0.0, le=1.0)
    unreadable_limit: float = Field(0.98, gt=0.0, le=1.0)
    jail: Literal["require", "best_effort", "off"] = "best_effort"
    jail_exempt: tuple[str, ...] = ()
    isolate: Literal["process", "completion"] = "process"
    reuse: int = Field(8192, ge=1)

    @field_validator("jail", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare off as false
