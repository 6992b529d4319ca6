"""From tokens to text while an answer grows: what was handed over is never taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from litft.infer.load import ChatModel

_SETTLE = 64
"""Tokens after which the older half of the undecided ones is looked at once more and then left alone."""


def tidy(text: str, stop: Sequence[str] = ()) -> str:
    """An answer without what follows the first of the stop texts, without line breaks in front or blanks at the end."""
    return before_stop(text, stop).lstrip("\r\n").rstrip()


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop texts."""
    found = [text.index(word) for word in stop if word in text]
    return text[: min(found, default=len(text))]


class TextStreamer:
    """Turns tokens into text that, once handed over, does not change any more.

    Held back are the first bytes of an unfinished character, what may begin a stop text and, with `strip`,
    blanks that may turn out to be the last.

    Args:
        bundle: whose tokens they are.
        on_text: called with each new piece.
        stop: texts that end the answer and are no part of it.
        strip: leave out line breaks in front and blanks at the end.

    Attributes:
        text: what was handed over so far.
    """

    def __init__(
        self, bundle: ChatModel, on_text: Callable[[str], None], stop: Sequence[str] = (), *, strip: bool = True
    ) -> None:
        self._bundle, self._on_text, self._stop, self._strip = bundle, on_text, tuple(stop), strip
        self._settled = ""  # text of tokens that later ones no longer change
        self._ids: list[int] = []  # the tokens after it
        self._prompt_passed = False
        self.text = ""

    def put(self, value: Any) -> None:
        """Take the prompt, then each new token, as a tensor: what transformers' `generate` calls."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        for id in value.flatten().tolist():
            self.add(id)

    def add(self, id: int) -> bool:
        """Take one new token; returns whether the answer now holds a stop text."""
        self._ids.append(id)
        whole = self._settled + self._bundle.decode(self._ids)
        text = self._cut(whole).rstrip("\ufffd")
        held = max((n for word in self._stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        text = text[: len(text) - held]
        self._hand_over(text.rstrip() if self._strip else text)
        self._settle()
        return any(word in whole for word in self._stop)

    def later(self, id: int) -> None:
        """Take one new token whose text nobody needs before the end."""
        self._ids.append(id)

    def end(self) -> None:
        """Hand over what was held back."""
        self._hand_over(self._cut(self._settled + self._bundle.decode(self._ids)))

    def _cut(self, text: str) -> str:
        return tidy(text, self._stop) if self._strip else before_stop(text, self._stop)

    def _settle(self) -> None:
        """Decode the older tokens no more, if the text falls apart there: a long answer would take time squared."""
        if len(self._ids) < _SETTLE or len(self._ids) % (_SETTLE // 2):
            return
        decode, old, new = self._bundle.decode, self._ids[: _SETTLE // 2], self._ids[_SETTLE // 2 :]
        if decode(old) + decode(new) == decode(self._ids) and not self._bundle.stop_ids.intersection(old):
            self._settled += decode(old)
            self._ids = new

    def _hand_over(self, text: str) -> None:
        if len(text) > len(self.text) and text.startswith(self.text):
            new, self.text = text[len(self.text) :], text
            self._on_text(new)
