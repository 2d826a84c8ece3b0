"""Tokens of a stream to text, as far as they are whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experts.stops import BROKEN, cut_at_stop


class Detokenizer:
    """Text of a growing sequence, whose pieces put together are the text of the whole.

    A tokenizer may write a token differently after another one, so that a few tokens before the new ones are
    always decoded again.
    """

    def __init__(self, tokenizer: Any, end_tokens: tuple[int, ...]) -> None:
        self._tokenizer, self._ends = tokenizer, end_tokens
        self._tokens: list[int] = []
        self._before, self._read = 0, 0

    def add(self, tokens: tuple[int, ...], last: bool = False) -> str:
        """The text that these tokens add; half a character waits for its other half, unless these are the last."""
        self._tokens += [token for token in tokens if token not in self._ends]
        known = self._tokenizer.decode(self._tokens[self._before : self._read])
        now = self._tokenizer.decode(self._tokens[self._before :])
        if len(now) <= len(known) or (now.endswith(BROKEN) and not last):
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return now[len(known) :]


class Stops:
    """Cuts a text that comes in pieces as `cut_at_stop` does; a stop string may lie across pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str, last: bool = False) -> tuple[str, bool]:
        """What can be shown by now, and whether a stop was met; what may be the beginning of one is held back."""
        text = self._held + text
        shown = cut_at_stop(text, self._stops)
        if shown != text:
            return shown, True
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which a stop begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
