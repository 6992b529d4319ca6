"""One answer, handed over while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers.generation import BaseStreamer

from litft.infer.generate import decoding, room, run, seeded, tidy
from litft.infer.load import ChatModel, Prompt


class Answer(NamedTuple):
    """An answer, and whether it came to its end (or was cut at the longest length allowed)."""

    text: str
    complete: bool


def stream(
    bundle: ChatModel,
    prompt: Prompt,
    on_text: Callable[[str], None],
    *,
    max_new_tokens: int = 1024,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> Answer:
    """Answer one prompt and hand over each piece of text as soon as it is certain.

    Args:
        bundle: of `load_for_inference`.
        prompt: as for `generate`.
        on_text: called with each new piece. An exception that it raises, or a KeyboardInterrupt, ends the answer.
        max_new_tokens: longest answer, in tokens; less where the model's context ends before.
        temperature: as for `generate`, like `top_p`, `top_k` and `stop`.
        top_p: see there.
        top_k: see there.
        seed: of the sampling; None draws anew.
        stop: see there.

    Returns:
        The answer; its text is what the pieces add up to.

    Raises:
        UserError: a setting out of range, or a prompt that leaves no room for an answer.
        DataError: a conversation that the chat template refuses.
    """
    settings = decoding(bundle, max_new_tokens, temperature, top_p, top_k, stop)
    settings.num_beams = 1  # several beams have no one text that grows
    ids = bundle.encode(prompt)
    settings.max_new_tokens = room(bundle, len(ids), max_new_tokens, "the conversation")
    streamer = TextStreamer(bundle, on_text, stop)
    with seeded(seed, bundle):
        new = run(bundle, [ids], settings, streamer)[0]
    stopped = new[-1] in bundle.stop_ids or any(word in bundle.decode(new) for word in stop)
    return Answer(streamer.text, stopped)


class TextStreamer(BaseStreamer):
    """Turns tokens into text that, once handed over, does not change any more.

    Held back are the first bytes of an unfinished character, blanks that may turn out to be the last, and what may be
    the beginning of a stop text.

    Attributes:
        text: what was handed over so far.
    """

    def __init__(self, bundle: ChatModel, on_text: Callable[[str], None], stop: Sequence[str] = ()) -> None:
        self._bundle, self._on_text, self._stop = bundle, on_text, tuple(stop)
        self._ids: list[int] | None = None  # None until the prompt has passed, which `generate` hands over first
        self.text = ""

    def put(self, value: Any) -> None:
        """Take the prompt, then each new token, as a tensor."""
        if self._ids is None:
            self._ids = []
            return
        self._ids.extend(value.flatten().tolist())
        text = tidy(self._bundle.decode(self._ids), self._stop).rstrip("\ufffd")
        held = max((n for word in self._stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
        self._hand_over(text[: len(text) - held].rstrip())

    def end(self) -> None:
        """Hand over what was held back."""
        self._hand_over(tidy(self._bundle.decode(self._ids or []), self._stop))

    def _hand_over(self, text: str) -> None:
        if len(text) > len(self.text) and text.startswith(self.text):
            new, self.text = text[len(self.text) :], text
            self._on_text(new)
