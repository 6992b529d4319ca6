"""Which characters of a rendered chat the model itself would have to produce.

The chat is rendered twice: as it stands, and with marks around every text in it. Where the second render without its
marks is the first one, letter for letter, the marks say exactly where each message's text stands. What surrounds the
texts, the scaffold, is learned once per template from a few small chats: the end of the generation prompt before an
answer, and the end-of-turn token after it. An answer begins where the generation prompt ends and ends after its
end-of-turn token; whatever cannot be found this way raises `MaskError`, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from litft.data.conversation import Message

Render = Callable[..., str]
"""`render(messages, tools, prompt=False, **variables) -> str`; raises `MaskError` where the template refuses."""

_OPEN, _CLOSE = "\U0010fdd0", "\U0010fdd1"
_MARK = re.compile(f"{_OPEN}(\\d+)([a-z]){_CLOSE}")
_TAGS = re.compile(r"(\s*<[^<>]*>)?(.*?)(<[^<>]*>\s*)?", re.DOTALL)
_NO_THINKING = {"enable_thinking": False, "thinking": False}


class MaskError(Exception):
    """Why a template, or a conversation in it, has no certain mask; `mend` says what to do about it."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(what, mend)
        self.what, self.mend = what, mend


@dataclass(slots=True, frozen=True)
class Scaffold:
    """What a chat template writes around the texts of a conversation.

    Attributes:
        prompts: by the role of the message before, what stands between the end of its text and the beginning of the
            answer; the default generation prompt first, then the ones for other cases.
        headers: the same without the end of the message before: what the generation prompt adds.
        ends: the end-of-turn texts that may close an answer.
        stops: those of them on which generation stops.
        by_next: the template ends a turn with the mark of the next one, so the last turn has no end.
        tools: it renders the schemas of tools.
        tool_calls: it renders tool calls, with their names, argument names and values.
        opening: what it writes before the first message where there is none with the role system.
    """

    prompts: dict[str, tuple[str, ...]]
    headers: tuple[str, ...]
    ends: tuple[str, ...]
    stops: tuple[str, ...]
    by_next: bool
    tools: bool
    tool_calls: bool
    opening: str = ""


@dataclass(slots=True)
class Layout:
    """Where the texts of one conversation stand in its render.

    Attributes:
        text: the render, without marks.
        marks: (position, message, kind) in the order of the text.
        tails: for each message, the end of its text that stands after its closing mark (trailing blanks).
    """

    text: str
    marks: list[tuple[int, int, str]]
    tails: list[str]

    def texts(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """Character ranges, in order, of the texts of messages that are not the assistant's."""
        spans, begin = [], {}
        for position, message, kind in self.marks:
            if kind == "c":
                begin[message] = position
            elif kind == "d" and message in begin and messages[message]["role"] != "assistant":
                spans.append((begin.pop(message), position))
        return sorted(spans)


def lay_out(render: Render, messages: Sequence[Message], tools: list | None, text: str, **options: Any) -> Layout:
    """Find where the text of each message stands in `text`, the render of `messages`.

    Raises:
        MaskError: the template rewrites the texts, so that they can't be followed.
    """
    for arguments, inner in ((True, False), (True, True), (False, False), (False, True)):
        marked, tails = _marked(messages, arguments, inner)
        pieces = _MARK.split(render(marked, tools, **options))
        if "".join(pieces[::3]) == text:
            marks, position = [], 0
            for k in range(1, len(pieces), 3):
                position += len(pieces[k - 1])
                marks.append((position, int(pieces[k]), pieces[k + 1]))
            return Layout(text, marks, tails)
    raise MaskError(
        "the chat template rewrites the text of the messages, so the answers can't be found in what it renders",
        "use a template that renders texts as they are, or one with {% generation %} marks",
    )


def check_marks(*texts: str) -> None:
    """Refuse text that contains the characters used as marks."""
    for text in texts:
        if _OPEN in text or _CLOSE in text or "\U0010fde0" in text or "\U0010fde1" in text:
            raise MaskError("a private-use character (U+10FDD0, U+10FDD1, U+10FDE0 or U+10FDE1) stands in the text")


def _mark(message: int, kind: str) -> str:
    return f"{_OPEN}{message}{kind}{_CLOSE}"


def _marked(messages: Sequence[Message], arguments: bool, inner: bool) -> tuple[list[Message], list[str]]:
    """Copies of the messages with marks around their texts, and what of each text stands after its closing mark."""
    result, tails = [], []
    for i, message in enumerate(messages):
        copy = dict(message)
        content, tail = _wrap(message.get("content") or "", i, "cd", inner and message["role"] != "assistant")
        if message.get("content"):
            copy["content"] = content
        if message.get("reasoning_content"):
            copy["reasoning_content"] = _wrap(message["reasoning_content"], i, "rs")[0]
        if arguments and message.get("tool_calls"):
            copy["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _wrap_leaves(call["function"]["arguments"], i)}}
                for call in message["tool_calls"]
            ]
        result.append(copy)
        tails.append(tail)
    return result, tails


def _wrap(text: str, message: int, kinds: str, inner: bool = False) -> tuple[str, str]:
    """Put marks around a text inside its outer blanks (and tags), where trimming and comparing don't meet them."""
    core = text.strip()
    if not core:
        return text, text
    begin = text.index(core)
    end = begin + len(core)
    if inner and (tags := _TAGS.fullmatch(text)):
        begin, end = tags.span(2)
    return text[:begin] + _mark(message, kinds[0]) + text[begin:end] + _mark(message, kinds[1]) + text[end:], text[end:]


def _wrap_leaves(value: Any, message: int) -> Any:
    if isinstance(value, str):
        return _wrap(value, message, "ab")[0]
    if isinstance(value, dict):
        return {key: _wrap_leaves(item, message) for key, item in value.items()}
    if isinstance(value, list):
        return [_wrap_leaves(item, message) for item in value]
    return value


def answers(layout: Layout, messages: Sequence[Message], scaffold: Scaffold) -> Iterator[tuple[int, int, int]]:
    """The character range that the model has to produce for each assistant message.

    Args:
        layout: where the texts stand.
        messages: the messages, as laid out.
        scaffold: what the template writes around them.

    Yields:
        (message, begin, end): from the end of the generation prompt to the end of the end-of-turn token.

    Raises:
        MaskError: a beginning or an end can't be found.
    """
    text, n = layout.text, len(messages)
    first: list[int | None] = [None] * n
    last: list[int | None] = [None] * n
    for position, i, _ in layout.marks:
        if first[i] is None:
            first[i] = position
        last[i] = position
    following, limit = [len(text)] * n, len(text)  # where the text of the messages after i begins
    for i in range(n - 1, -1, -1):
        following[i] = limit
        position = first[i]
        limit = min(limit, position) if position is not None else limit
    ends = re.compile("|".join(map(re.escape, sorted(scaffold.ends, key=len, reverse=True))) or "(?!)")

    before, before_at = None, 0  # the message whose text ends last so far, and where
    joined = False  # the answer goes on in the next assistant message, without a header
    for i, message in enumerate(messages):
        begins, stops, until = first[i], last[i], following[i]
        if begins is not None and (begins < before_at or (stops or 0) > until):
            raise MaskError(f"the chat template moves the text of message {i + 1} out of its order")
        if message["role"] == "assistant":
            room = until if begins is None else begins
            begin = before_at if joined else _beginning(text, before_at, room, layout, messages, before, i, scaffold)
            found = ends.search(text, max(begin, stops or 0), until)
            after = messages[i + 1]["role"] if i + 1 < n else None
            header = _find_any(text, scaffold.headers, max(begin, stops or 0), until) if after == "assistant" else -1
            joined = after == "assistant" and header < 0 and not found
            if found and not (0 <= header < found.start()):
                end = found.end()
            elif joined:
                end = max(begin, stops or 0)
            elif scaffold.by_next and (after is None or header >= 0):
                rest = text[max(begin, stops or 0) : until if header < 0 else header]
                end = max(begin, stops or 0) + len(rest.rstrip())
            else:
                raise MaskError(
                    f"no end-of-turn token after assistant message {i + 1}: the chat template writes none there",
                    "use a template that ends every assistant turn with the token on which generation stops",
                )
            yield i, begin, end
            before, before_at = i, max(before_at, end)
        elif stops is not None:
            before, before_at = i, stops


def _beginning(
    text: str,
    at: int,
    room: int,
    layout: Layout,
    messages: Sequence[Message],
    before: int | None,
    message: int,
    scaffold: Scaffold,
) -> int:
    """Where the answer of `message` begins, between `at` (the text before it) and `room` (its own text)."""
    if before is not None and messages[before]["role"] != "assistant":
        tail = layout.tails[before]
        for prompt in scaffold.prompts.get(messages[before]["role"], ()):
            for blanks in {len(tail): 0, len(tail.rstrip()): 0} | dict.fromkeys(range(len(tail))):
                if prompt and at + blanks + len(prompt) <= room and text.startswith(prompt, at + blanks):
                    return at + blanks + len(prompt)
    for header in scaffold.headers:
        found = text.find(header, at, room)
        if found >= 0:
            return found + len(header)
    raise MaskError(f"the generation prompt does not stand before assistant message {message + 1}")


def _find_any(text: str, parts: Sequence[str], begin: int, end: int) -> int:
    return min((at for part in parts if part and (at := text.find(part, begin, end)) >= 0), default=-1)
