"""Where in a completion the answer stands, and what it reads without its markup."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_LEAD = re.compile(r"\banswer[^\S\n]*(?:is\b[^\S\n]*:?|:)", re.IGNORECASE)
_BOXED = "\\boxed{"
_WRAPPED = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"```\w*\n(.*)\n```", r"\*\*(.*)\*\*", r"`(.*)`", r"\\text(?:bf)?\{(.*)\}",
        r"\$\$(.*)\$\$", r"\$(.*)\$", r"\\\((.*)\\\)", r"\\\[(.*)\\\]",
    )
]  # fmt: skip
_MARKUP = re.compile(r"[\\*`$]|####|answer|\.$", re.IGNORECASE)
_MOST_LAYERS = 8


def readings(completion: str, gold: str | None) -> Iterator[str]:
    """The answer as it stands in a completion, then without its markup, one layer after the other.

    The answer is what follows the last `</think>`, of that what stands between the last <answer> and </answer>, or
    behind an <answer> that is not closed, if there is one.  Markup is what stands around the last \\boxed{}, "####",
    "the answer is", a code block, bold, dollars, and a final full stop that the gold answer has not.  Nothing comes of
    a completion that ends in its thoughts.  Time is linear in the text.
    """
    answer = completion.strip()
    if "<" in answer:  # most have no tags, and this is on every completion's way
        said = answer.rpartition("</think>")[2]
        if "<think>" in said:
            return
        answer = _tagged(said).strip()
    yield answer
    if not _MARKUP.search(answer):  # most answers have none
        return
    for _ in range(_MOST_LAYERS):
        bare = _without_layer(answer, stop=(gold or "").rstrip().endswith("."))
        if bare in ("", answer):
            return
        yield bare
        answer = bare


def _tagged(text: str) -> str:
    tags = list(_TAG.finditer(text))
    opened = None
    found = None
    for tag in tags:
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            found, opened = text[opened : tag.start()], None
    if found is None and opened is not None:
        found = text[opened:]
    return text if found is None else found


def _without_layer(answer: str, stop: bool) -> str:
    """The answer without its outermost markup.

    stop: whether a final full stop belongs to it.
    """
    boxed = _boxed(answer)
    if boxed is not None:
        return boxed.strip()
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    leads = list(_LEAD.finditer(answer)) if "answer" in answer.lower() else None
    if leads:
        return answer[leads[-1].end() :].strip()
    for pattern in _WRAPPED if answer.startswith(("`", "*", "$", "\\")) else ():
        if found := pattern.fullmatch(answer):
            return found[1].strip()
    return answer[:-1].rstrip() if answer.endswith(".") and not stop else answer


def _boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{} that is closed, braces inside it included."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, inside = 1, start + len(_BOXED)
    for at in range(inside, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if not depth:
            return text[inside:at]
    return None
