"""One answer, handed over while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from litft.infer.engine import Engine, Request
from litft.infer.generate import decoding, room
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
    min_p: float | None = None,
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
        min_p: see there.

    Returns:
        The answer; its text is what the pieces add up to.

    Raises:
        UserError: a setting out of range, or a prompt that leaves no room for an answer.
        DataError: a conversation that the chat template refuses.
    """
    settings = decoding(bundle, max_new_tokens, temperature, top_p, top_k, stop, min_p)
    settings.num_beams = 1  # several beams have no one text that grows
    ids = bundle.encode(prompt)
    longest = room(bundle, len(ids), max_new_tokens, "the conversation")
    request = Request(ids, settings, longest, seed=seed, stop=stop, on_text=on_text)
    Engine(bundle, slots=1).run([request])
    return Answer(request.text, request.finish == "stop")
