"""Texts that end an answer where they first appear in it.

An answer's text is that of its tokens by themselves, all of them decoded together.  It is looked at after every token,
and the token with which a stop string first is in it is the answer's last.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

BROKEN = "\ufffd"  # what a decoder shows of half a character
# Decoders that write a token the same wherever it stands, but for a space in front of the first one and for halves of
# characters.
SIMPLE = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace")
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class StopStrings:
    """Stop strings as one tokenizer writes them.

    Decoding a whole answer after each of its tokens would take longer the longer it is.  Most tokens cannot complete a
    stop string, by their own text; for the others the last few tokens are decoded, as many as can hold one.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self._tokenizer = tokenizer
        # What is shown of half a character depends on what stands around it.
        self._pieces = _pieces_of(tokenizer) if stops and BROKEN not in "".join(stops) else None
        self._longest = max((len(stop.encode()) for stop in stops), default=0)
        self._ends = tuple(stop[at:] for stop in stops for at in range(1, len(stop)))
        self._may_end: dict[int, bool] = {}

    def __bool__(self) -> bool:
        return bool(self.stops)

    def may_end(self, token: int) -> bool:
        """Whether an answer can end with this token."""
        found = self._may_end.get(token)
        if found is None:
            found = self._may_end[token] = self._completes(token)
        return found

    def end(self, tokens: Sequence[int]) -> bool:
        """Whether an answer that had not ended before ends with the last of its tokens."""
        if not self.may_end(tokens[-1]):
            return False
        text = self._tokenizer.decode(self._window(tokens))
        return any(stop in text for stop in self.stops)

    def length(self, tokens: Sequence[int]) -> int | None:
        """Number of tokens up to the one with which the answer ends; None when it does not."""
        return next((at + 1 for at, t in enumerate(tokens) if self.may_end(t) and self.end(tokens[: at + 1])), None)

    def _completes(self, token: int) -> bool:
        piece = None if self._pieces is None else self._pieces.of(token)
        if piece is None or BROKEN in piece.text:
            return True
        return piece.text.startswith(self._ends) or any(stop in piece.text for stop in self.stops)

    def _window(self, tokens: Sequence[int]) -> Sequence[int]:
        """The last tokens, with all that a stop string which ends in the last one can lie in."""
        pieces = self._pieces
        if pieces is None:
            return tokens
        start, size = len(tokens) - 1, 0
        while start > 0 and size < self._longest:
            start -= 1
            size += pieces.of(tokens[start]).bytes
        start = max(start - 1, 0)  # the first one may lose the space in front of it
        while start > 0 and pieces.of(tokens[start]).single:
            start -= 1
        return tokens[start:]


class Piece(NamedTuple):
    """A token's own text.

    bytes: that it is certain to add.  single: whether it is one byte, which is read together with those around it.
    """

    text: str
    bytes: int
    single: bool


class _Pieces:
    """Texts of a tokenizer's tokens, each decoded once, behind another one."""

    def __init__(self, tokenizer: Any, anchor: int) -> None:
        self._tokenizer, self._anchor = tokenizer, anchor
        self._before = tokenizer.decode([anchor])
        self._known: dict[int, Piece] = {}

    def of(self, token: int) -> Piece:
        """The token's text."""
        found = self._known.get(token)
        if found is None:
            both = self._tokenizer.decode([self._anchor, token])
            text = both.removeprefix(self._before) if both.startswith(self._before) else BROKEN
            size = 1 if BROKEN in text else len(text.encode())
            found = self._known[token] = Piece(text, size, _is_byte(self._tokenizer, token))
        return found


@functools.lru_cache(maxsize=16)
def _pieces_of(tokenizer: Any) -> _Pieces | None:
    """None for a tokenizer that may write a token otherwise beside others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return None
    state = json.loads(backend.decoder.__getstate__())
    if not all(map(_is_simple, state.get("decoders", [state]))):
        return None
    plain = (t for t in range(len(tokenizer)) if tokenizer.decode([t]).isalnum() and not _is_byte(tokenizer, t))
    anchor = next(plain, None)
    return None if anchor is None else _Pieces(tokenizer, anchor)


def _is_simple(decoder: Mapping[str, Any]) -> bool:
    if decoder["type"] == "Replace":
        return len(decoder["pattern"].get("String", "")) == 1
    return decoder["type"] in SIMPLE or (decoder["type"] == "Strip" and not decoder["stop"])


def _is_byte(tokenizer: Any, token: int) -> bool:
    return BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token) or "") is not None


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """What stands in front of the stop string that is complete first; the whole text where there is none."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(found)[1]] if found else text
