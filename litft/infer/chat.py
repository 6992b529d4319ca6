"""`litft chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TextIO

from litft.data.conversation import Message
from litft.errors import UserError
from litft.infer.load import ChatModel

_HELP = """/reset  forget the conversation and start again
/exit   leave (so does Ctrl-D)
/help   this list
Ctrl-C  stop an answer; the part that was given stays in the conversation"""
_YOU, _MODEL = "you> ", "model> "


def chat(
    bundle: ChatModel,
    *,
    system: str | None = None,
    input: TextIO | None = None,
    output: TextIO | None = None,
    **decoding: Any,
) -> list[Message]:
    """Talk with a model until the input ends or the user leaves.

    Args:
        bundle: of `load_for_inference`; its tokenizer needs a chat template.
        system: a system message that stands before the conversation, after `/reset` too.
        input: lines to read; None is the terminal, with line editing.
        output: where prompts and answers go; None is stdout.
        decoding: `max_new_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `seed` and `stop` of `stream`.

    Returns:
        The conversation as it stood at the end.

    Raises:
        UserError: a model without a chat template, or a decoding setting out of range.
    """
    from litft.infer.generate import decoding as check_decoding
    from litft.infer.stream import stream

    if bundle.encoder is None:
        raise UserError(
            f"{bundle.name}: its tokenizer has no chat template, so it cannot chat\n"
            "continue plain text with `litft generate`, or take a model that was fine-tuned on chats"
        )
    check_decoding(bundle, **{key: value for key, value in decoding.items() if key != "seed"})
    out = output or sys.stdout
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    history = list(opening)

    def say(text: str, end: str = "\n") -> None:
        out.write(text + end)
        out.flush()

    def answer(messages: list[Message]) -> str | None:
        """Stream the next answer; None where there is none and the turn is to be forgotten."""
        pieces: list[str] = []

        def show(piece: str) -> None:
            if not pieces:
                say(_MODEL, end="")
            pieces.append(piece)
            say(piece, end="")

        try:
            complete = stream(bundle, messages, show, **decoding).complete
        except KeyboardInterrupt:
            say(" (stopped)" if pieces else "(stopped)")
            return "".join(pieces) or None
        except UserError as error:  # too long for the model, or refused by its template: the user can go on
            say(f"({error}; /reset starts again)")
            return None
        if not complete:
            say(" (cut at the longest answer allowed)")
        else:
            say("" if pieces else f"{_MODEL}(an empty answer)")
        return "".join(pieces)

    read = _reader(input, say)
    say(f"{bundle.name or 'model'}: /help lists the commands, Ctrl-D ends")
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            say("\n(Ctrl-D or /exit to leave)")
            continue
        text = None if line is None else line.strip()
        if text is None or text in ("/exit", "/quit"):
            return history
        if text == "/reset":
            history = list(opening)
            say("(forgotten)")
        elif text == "/help":
            say(_HELP)
        elif text.startswith("/") and text[1:].isalpha():
            say(f"(no command {text}; /help lists them)")
        elif text:
            asked: Message = {"role": "user", "content": text}
            given = answer([*history, asked])
            if given is not None:
                history += [asked, {"role": "assistant", "content": given}]


def _reader(source: TextIO | None, say: Callable[..., None]) -> Callable[[], str | None]:
    """A function that asks for a line and returns it, None at the end of the input."""

    def read_stream() -> str | None:
        say(_YOU, end="")
        line = source.readline() if source is not None else ""
        if not line:
            say("")
        return line or None

    def read_terminal() -> str | None:
        try:
            return input(_YOU)
        except EOFError:
            say("")
            return None

    if source is not None:
        return read_stream
    with contextlib.suppress(ImportError):  # line editing and history; absent on Windows
        import readline  # noqa: F401
    return read_terminal
