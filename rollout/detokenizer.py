"""Tokens of a stream to text, as far as they are whole characters."""

from __future__ import annotations

from typing import Any

BROKEN = "\ufffd"  # what a decoder shows of half a character


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
