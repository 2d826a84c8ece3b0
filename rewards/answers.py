"""Where a completion states its final answer.  docs/tasks.md, "How an answer is read", has the rules in words.

Every function here takes time linear in the text: no pattern can backtrack over a long run.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from rollout.types import Prompt

_THINK, _END_OF_THINK = "<think>", "</think>"
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACE = re.compile(r"\\(?:boxed|fbox)[ \t]{0,9}\{|\\.|[{}]", re.DOTALL)
_SPOKEN = re.compile(r"\banswer\s++is\b", re.IGNORECASE)
# Markup between a marker and what it marks, and delimiters of formulas on a line of their own.
_LEAD = re.compile(r"(?:[\s*_:#`]|(?:\$\$?|\\[\[(])[ \t]*+\n)*+")
_QUESTION = r"question(?: ?[0-9]{1,4})? ?:"
_LONGEST_MARKER = 200  # characters of a template's line in front of the question

# What may wrap a text without being a part of it, outermost first.
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ('"', '"'), ("“", "”"), ("(", ")"), ("{", "}"))
_COMMAND = re.compile(r"\\(?:boxed|fbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|emph)[ \t]{0,9}\{")
_ELEMENT = re.compile(r"<([A-Za-z]{1,20})>(.*)</\1>", re.DOTALL)
_LABEL = re.compile(r"(?:the )?(?:final )?answer(?: is|:)[\s:]*+", re.IGNORECASE)
_WRAPPINGS = 12  # a text in more of them than that is left as it is


def stated_text(completion: str, prompt: Prompt) -> str:
    """The completion without its reasoning in <think> and without another question and what follows it.

    Empty when <think> is not closed: nothing was answered.
    """
    text = completion.rpartition(_END_OF_THINK)[2]
    if _THINK in text:
        return ""
    marker, lowered = _question_marker(prompt), text.lower()
    if "question" not in lowered and (not marker or marker.lower() not in lowered):
        return text
    for found in _next_question(marker).finditer(text):
        if text[: found.start()].strip():  # a question at the very start is an echo of the prompt
            return text[: found.start()]
    return text


def marked_part(text: str) -> str | None:
    r"""What the text marks as its answer: the last of the first kind present, innermost mark first undone.

    The kinds: <answer>...</answer>, \boxed{...} or \fbox{...}, the line of "####", the line of "answer is".  None
    when the text has none of them.
    """
    part = None
    for find in (_tagged, _boxed, _hashed, _spoken):
        found = find(text if part is None else part)
        part = part if found is None else found
    return part


def plain_text(text: str) -> str:
    """The text in Unicode's form C, lower case and single spaces, without what wraps it and a final full stop."""
    bare = " ".join(unicodedata.normalize("NFC", text).split())
    for _ in range(_WRAPPINGS):
        less = _unwrapped(bare)
        if less == bare or not less:
            break
        bare = less
    return unicodedata.normalize("NFC", bare.casefold())


def _question_marker(prompt: Prompt) -> str:
    """The line, or its beginning, that stands before the question in the prompt; empty where none can be told.

    A beginning that ends in a letter or digit ("The {question}") would be found in any answer.
    """
    question = prompt.payload.get("question")
    content = prompt.messages[-1]["content"] if prompt.messages else ""
    if not isinstance(question, str) or not question or content.startswith(question):
        return ""
    before = content.partition(question)[0]
    if len(before) == len(content):
        return ""
    line = (before.rstrip().splitlines() or [""])[-1].strip()
    whole = "\n" in before[len(before.rstrip()) :]
    usable = any(map(str.isalpha, line)) and (whole or not line[-1].isalnum())
    return line if usable and len(line) <= _LONGEST_MARKER else ""


@lru_cache(maxsize=64)
def _next_question(marker: str) -> re.Pattern[str]:
    marks = f"(?:{re.escape(marker)}|{_QUESTION})" if marker else _QUESTION
    return re.compile(rf"^[ \t*_#>]{{0,8}}{marks}", re.MULTILINE | re.IGNORECASE)


def _tagged(text: str) -> str | None:
    part, start = None, None
    for found in _TAG.finditer(text):
        if not found[1]:
            start = found.end()
        elif start is not None:
            part, start = text[start : found.start()], None
    return part


def _boxed(text: str) -> str | None:
    """The content of the box that is closed last; a box that is never closed is none."""
    if "boxed" not in text and "fbox" not in text:
        return None
    part, open_braces = None, []
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            open_braces.append(-1)
        elif found[0].endswith("{") and len(found[0]) > 2:
            open_braces.append(found.end())
        elif found[0] == "}" and open_braces and (start := open_braces.pop()) >= 0:
            part = (start, found.start())
    return None if part is None else text[slice(*part)]


def _hashed(text: str) -> str | None:
    _, mark, after = text.rpartition("####")
    return _first_line(after) if mark else None


def _spoken(text: str) -> str | None:
    last = None
    for last in _SPOKEN.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    return None if last is None else _first_line(text[last.end() :])


def _first_line(text: str) -> str:
    """The first line with more than markup on it."""
    lead = _LEAD.match(text)
    return text[lead.end() if lead else 0 :].partition("\n")[0]


def _unwrapped(text: str) -> str:
    """Without one layer of markup, label or brackets around all of the text, and without a final full stop."""
    bare = text.strip(" *_`#").removesuffix(".").removesuffix("。").rstrip()
    if label := _LABEL.match(bare):
        return bare[label.end() :]
    if element := _ELEMENT.fullmatch(bare):
        return element[2].strip()
    if (command := _COMMAND.match(bare)) and bare.endswith("}") and _closes(bare, command.end() - 1):
        return bare[command.end() : -1].strip()
    for first, last in _PAIRS:
        inside = bare[len(first) : len(bare) - len(last)]
        if bare.startswith(first) and bare.endswith(last) and len(bare) > len(first + last) - 1:
            if first not in inside and last not in inside:
                return inside.strip()
            break
    return bare


def _closes(text: str, start: int) -> bool:
    """Whether the brace at `start` is closed by the last character and not before."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place == len(text) - 1
    return False
