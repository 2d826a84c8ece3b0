"""How a conversation becomes the token ids of one model: chat template, special tokens, and a run's fixed date.

Only a template may write control tokens. What a message says is text, even where it spells one out.
"""

from __future__ import annotations

import datetime
import functools
import inspect
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateSyntaxError, nodes
from tokenizers import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Scalar = str | int | float | bool | None


class ChatError(ValueError):
    """A conversation that a model cannot be shown, or arguments that its template does not take."""


@dataclass(frozen=True)
class ChatSettings:
    """What the rendering of a conversation depends on besides the model and the messages.

    variables: `chat_template_kwargs`: further variables of the chat template.
    date: that `strftime_now` of a chat template reads; None takes the clock's.
    """

    variables: Mapping[str, Scalar] = field(default_factory=dict)
    date: datetime.date | None = None


class Reading(NamedTuple):
    """A conversation as a model reads it.

    tokens: their ids.
    cut: whether the middle was left out.
    key: text that tells it from everything that the model would read as other tokens.
    """

    tokens: list[int]
    cut: bool
    key: str


class Chat:
    """Renders and tokenizes the conversations of one model.

    closed: whether what the tokenizer puts behind a text stays there, as encoders are used to.

    Raises:
        ChatError: when the chat template reads none of the variables of that name.
    """

    def __init__(self, tokenizer: Any, settings: ChatSettings | None = None, closed: bool = False) -> None:
        self.tokenizer, self.settings, self.closed = tokenizer, settings or ChatSettings(), closed
        check_variables(self.template, self.settings.variables)

    @property
    def template(self) -> str | None:
        """The chat template that ordinary conversations are rendered by; None where there is none."""
        return str(self.tokenizer.get_chat_template()) if getattr(self.tokenizer, "chat_template", None) else None

    @property
    def prints_date(self) -> bool:
        """Whether the chat template asks for today's date."""
        return "strftime_now" in (self.template or "")

    @property
    def date(self) -> str:
        """The fixed date where the template prints one; else empty."""
        return str(self.settings.date) if self.prints_date and self.settings.date else ""

    def render(self, messages: Messages) -> str:
        """The text a model is shown: its chat template where it has one, else the contents joined by newlines.

        Raises:
            ChatError: when the template refuses these messages, as some do a system message.
        """
        if self.template is None:
            return "\n".join(message["content"] for message in messages)
        variables: dict[str, Any] = dict(self.settings.variables)
        if self.settings.date is not None:
            midnight = datetime.datetime.combine(self.settings.date, datetime.time())
            variables["strftime_now"] = midnight.strftime  # in front of the global of that name, which asks the clock
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:  # a template is a program of the model's own, and may raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ChatError(
                f"model {self.tokenizer.name_or_path!r}: its chat template refuses this conversation: {reason}"
            ) from error
        return str(text)

    def tokenize(self, messages: Messages) -> list[int]:
        """Token ids of the rendered messages.

        A chat template brings its own special tokens; without one the tokenizer adds those that stand in front, and
        none behind: an end token would tell the model that the prompt is over.

        Raises:
            ChatError: as `render`.
        """
        return self.read(messages).tokens

    def read(self, messages: Messages, most: int | None = None) -> Reading:
        """A conversation as text and as tokens.

        most: tokens; of a longer one the first part stays (see `_head`) and the last, and the middle goes.

        Raises:
            ChatError: as `render`.
        """
        text, tokens, usual = self._whole(messages)
        cut = most is not None and len(tokens) > most
        if cut and most is not None:
            head = self._head(messages, tokens, most)
            tokens = tokens[:head] + tokens[len(tokens) - (most - head) :]
        # What the text alone tells apart needs no more: so it was before, and keys of before are good.
        key = text if usual and not cut else f"{text}\0{tokens}"
        return Reading(tokens, cut, key)

    def text_tokens(self, text: str) -> list[int]:
        """Token ids of a text by itself, with no special token among them."""
        if not self._spells_control(text):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._guard.tokens(self._guard.mask(text), whole=False)

    def _whole(self, messages: Messages) -> tuple[str, list[int], bool]:
        """Text and token ids, and whether these are what the tokenizer itself makes of the text."""
        front, behind = self._added if self.template is None else ([], [])
        if not any(self._spells_control(message["content"]) for message in messages):
            text = self.render(messages)
            tokens = list(self.tokenizer(text, add_special_tokens=self.template is None)["input_ids"])
            left_out = 0 if self.closed else len(behind)
            return text, tokens[: len(tokens) - left_out], not left_out
        guard = self._guard
        masked = self.render([{**message, "content": guard.mask(message["content"])} for message in messages])
        inside = guard.tokens(masked, whole=self.template is not None)
        return guard.unmask(masked), front + inside + (behind if self.closed else []), False

    def _head(self, messages: Messages, tokens: Sequence[int], most: int) -> int:
        """How many tokens stay in front where `most` stay in all.

        What stands before the first content (a BOS token, the template's header), at least a quarter, at most half.
        """
        others = (self.tokenize([{**message, "content": other} for message in messages]) for other in ("0", "a"))
        header = min(_common(tokens, other) for other in others)
        return min(max(header, most // 4), most // 2)

    @functools.cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer itself puts in front of a text and behind it."""
        bare, full = (list(self.tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
        places = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
        at = places[0] if bare and places else len(full)
        return full[:at], full[at + len(bare) :]

    def _spells_control(self, content: str) -> bool:
        """Whether a content holds the text of a control token, as it is or as the tokenizer normalizes it."""
        if not self._control:
            return False
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        seen = [content] if normalizer is None else [content, normalizer.normalize_str(content)]
        return any(self._names.search(text) for text in seen)

    @functools.cached_property
    def _control(self) -> dict[str, int]:
        """The control tokens' ids by their text; one of a single character is that character, and ordinary."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        found = {token.content: at for at, token in added.items() if token.special}
        named = [str(text) for text in self.tokenizer.all_special_tokens]  # an end token need not be marked as special
        found |= dict(zip(named, self.tokenizer.convert_tokens_to_ids(named), strict=True))
        return {text: at for text, at in found.items() if len(text) > 1}

    @functools.cached_property
    def _names(self) -> re.Pattern[str]:
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        normal = [] if normalizer is None else [normalizer.normalize_str(name) for name in self._control]
        return any_of({*self._control, *normal} - {""})

    @functools.cached_property
    def _guard(self) -> Guard:
        """Made when the first content spells out a control token; most models never meet one."""
        return Guard(self.tokenizer, self._control)


class Guard:
    """Tokenizes text in which only some spellings of control tokens are control tokens.

    A content's spellings are masked, by digits that no text holds, while a template is rendered around them.  The
    spellings that are left are the template's.  These get names that no text holds either, under which a double of the
    tokenizer knows the control tokens; it does not know their usual names, and reads those as any other text.
    """

    def __init__(self, tokenizer: Any, control: Mapping[str, int]) -> None:
        self._tokenizer, self._control = tokenizer, control
        self._spelled = list(control)
        self._pattern = any_of(control)
        masks, names = (f"{secrets.randbits(120):040}" for _ in range(2))
        self._masks = {text: f"{masks}{place:06}" for place, text in enumerate(self._spelled)}
        self._masked = re.compile(rf"{masks}(\d{{6}})")
        self._names = {text: f"{names}{place:06}" for place, text in enumerate(self._spelled)}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._double = None if backend is None else renamed(backend, self._names)

    def mask(self, content: str) -> str:
        """A content with digits in place of every control token that it spells out."""
        return self._pattern.sub(lambda found: self._masks[found.group()], content)

    def unmask(self, text: str) -> str:
        """The text with the spellings back."""
        return self._masked.sub(lambda found: self._spelled[int(found.group(1))], text)

    def tokens(self, masked: str, whole: bool) -> list[int]:
        """Token ids.

        whole: whether spellings that are not masked are control tokens; else there are none.
        """
        if self._double is None:
            return self._piece_by_piece(masked)
        if whole:
            masked = self._pattern.sub(lambda found: self._names[found.group()], masked)
        return list(self._double.encode(self.unmask(masked), add_special_tokens=False).ids)

    def _piece_by_piece(self, masked: str) -> list[int]:
        """The same for a tokenizer in Python, which has no double: what stands between control tokens by itself."""
        ends = [(found.start(), found.end()) for found in self._pattern.finditer(masked)]
        starts = [0, *(end for _, end in ends)]
        ids: list[int] = []
        for start, (stop, end) in zip(starts, [*ends, (len(masked), len(masked))], strict=True):
            piece = self.unmask(masked[start:stop])
            ids += self._tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids += [self._control[masked[stop:end]]] if end > stop else []
        return ids


def renamed(tokenizer: Tokenizer, names: Mapping[str, str]) -> Tokenizer:
    """The same tokenizer with some of its tokens under other names, which adds no token by itself.

    Their old names are no token any more: not even the vocabulary, in which Unigram finds what is not split in front of
    it, has them.
    """
    made = json.loads(tokenizer.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
    for token in made["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "normalized": False}
    model, vocabulary = made["model"], made["model"]["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): place for text, place in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))]
    return Tokenizer.from_str(json.dumps(made))


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of these texts, the longest one where several begin."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def variables_of(template: str) -> set[str]:
    """Names that a chat template reads; of one in a dialect of its own, every word that stands in it."""
    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return set(re.findall(r"\w+", template))
    return {name.name for name in parsed.find_all(nodes.Name) if name.ctx == "load"}


def check_variables(template: str | None, variables: Mapping[str, Scalar]) -> None:
    """Refuses variables that change nothing.

    Raises:
        ChatError: naming one that the template does not mention, or that is not for it.
    """
    from transformers import PreTrainedTokenizerBase

    if variables and template is None:
        raise ChatError(f"chat_template_kwargs: it has no chat template that could read {next(iter(variables))!r}")
    read = variables_of(template or "")
    own = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
    for name in variables:
        if name == "strftime_now":
            raise ChatError("chat_template_kwargs: strftime_now is what data.date fixes: give that")
        if name in own:
            raise ChatError(f"chat_template_kwargs: {name!r} is set by n-Musketeers, not by a recipe")
        if name not in read:
            raise ChatError(f"chat_template_kwargs: its chat template never reads {name!r}: leave it out")


@dataclass(frozen=True)
class Wording:
    """How a task's messages are made of questions.

    message: the whole of one, with `{question}`; of a composed task with `{part1}`, `{part2}`, ... instead.
    question: what counts as the question in it, in the same fields.
    parts: for each numbered field, the task that its question is of.
    """

    message: str
    question: str = "{question}"
    parts: tuple[str, ...] = ()

    @property
    def fixed(self) -> int:
        """Number of characters that do not depend on the questions."""
        return len(_FIELD.sub("", self.message))

    def fields(self, content: str) -> dict[str, str] | None:
        """What the fields of such a message hold; None of another message.

        Time is linear in the content where a field stands but once.
        """
        if not self.parts:
            first, *others = (re.escape(part) for part in self.message.split("{question}"))
            pattern = first + r"(?P<question>.*)" + r"(?P=question)".join(others)
            found = re.fullmatch(pattern, content, re.DOTALL) if others else None
            return None if found is None else {"question": found["question"]}
        return _fields(self.message, content)


@dataclass(frozen=True)
class PromptStyle:
    """What a run fixes of all its prompts.

    date: see `ChatSettings`.
    template: `data.template`, by which a question became a message.
    wordings: of the tasks whose messages are made otherwise.
    """

    date: datetime.date | None = None
    template: str = "{question}"
    wordings: tuple[Wording, ...] = ()

    def question(self, content: str, parts: Sequence[str] = ()) -> str:
        """The question in a message of the run; of another message, all of it.

        parts: names of tasks; of a composed message with questions of theirs, these alone, one below the other.
        """
        for wording in self._wordings:
            fields = wording.fields(content)
            if fields is None:
                continue
            own = [fields[f"part{n}"] for n, task in enumerate(wording.parts, start=1) if task in parts]
            return "\n".join(own) or _filled(wording.question, fields)
        return content

    @functools.cached_property
    def _wordings(self) -> list[Wording]:
        """All of them, those first that say most themselves: `{question}` alone is every message."""
        return sorted((*self.wordings, Wording(self.template)), key=lambda wording: -wording.fixed)


_FIELD = re.compile(r"{(question|part[0-9]+)}")


def _filled(template: str, fields: Mapping[str, str]) -> str:
    return _FIELD.sub(lambda found: fields[found[1]], template)


def _fields(message: str, content: str) -> dict[str, str] | None:
    """See `Wording.fields`: each field ends where the text behind it is found first."""
    front, *rest = _FIELD.split(message)
    if not content.startswith(front):
        return None
    at, found = len(front), dict[str, str]()
    for index in range(0, len(rest), 2):
        name, behind = rest[index : index + 2]
        if name in found:
            end = at + len(found[name])
        elif index + 2 == len(rest):
            end = len(content) - len(behind)
        else:
            end = content.find(behind, at) if behind else -1
        value, after = content[at:end], end + len(behind)
        if end < at or not content.startswith(behind, end) or found.setdefault(name, value) != value:
            return None
        at = after
    return found if at == len(content) else None


def worded(
    messages: Messages, template: str | None, system: str | None, style: PromptStyle, parts: Sequence[str] = ()
) -> Messages:
    """A conversation as an expert is asked it; see `experts.config.ExpertConfig`.

    template: of the last user message.  system: message in front, instead of any other; an empty one is none.
    parts: tasks of whose questions `{question}` is made where the message is composed of them.
    """
    said = [dict(message) for message in messages]
    asked = [message for message in said if message["role"] == "user"]
    if template is not None and asked:
        content = asked[-1]["content"]
        known = {"{prompt}": content, "{question}": style.question(content, parts)}
        asked[-1]["content"] = re.sub(r"{(?:prompt|question)}", lambda found: known[found.group()], template)
    if system is None:
        return said
    first = [{"role": "system", "content": system}] if system else []
    return first + [message for message in said if message["role"] != "system"]


def canonical(variables: Mapping[str, Scalar]) -> str:
    """A text of them for hashing; empty where there are none."""
    return json.dumps(dict(variables), sort_keys=True) if variables else ""


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what two rows have in common at their beginnings."""
    same = (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(same, min(len(one), len(other)))
