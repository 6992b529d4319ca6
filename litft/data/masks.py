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

import numpy as np

from litft.data.conversation import Message
from litft.errors import UserError

Render = Callable[..., str]
"""`render(messages, tools, prompt=False, **variables) -> str`; raises `MaskError` where the template refuses."""

Span = tuple[int, int]
"""Half-open range of characters."""

MARK_OPEN, MARK_CLOSE = "\U0010fdd0", "\U0010fdd1"
_MARK = re.compile(f"{MARK_OPEN}(\\d+)([a-zA-Z]){MARK_CLOSE}")  # some templates write text in capitals
_RESERVED = re.compile("[\U0010fdd0\U0010fdd1\U0010fde0\U0010fde1]")
_TAGS = re.compile(r"(?:\s*<[^<>]*>)?(.*?)(?:<[^<>]*>\s*)?", re.DOTALL)


class MaskError(UserError):
    """Why a template, or a conversation in it, has no certain mask; `mend` says what to do about it."""

    def __init__(self, what: str, mend: str = "") -> None:
        super().__init__(f"{what}; {mend}" if mend else what)
        self.what, self.mend = what, mend


@dataclass(slots=True, frozen=True)
class Scaffold:
    """What a chat template writes around the texts of a conversation.

    Attributes:
        prompts: by the role of the message before, what stands between the end of its text (of its answer, for an
            assistant's) and the beginning of the next answer; the default generation prompt first, then other forms.
        headers: of that, the part which opens the assistant's turn.
        ends: the texts that may close an answer, each ending with an end-of-turn token.
        stops: those of them on which generation stops.
        by_next: the template closes a turn with the mark of the next one, so the last turn has no end.
        tools: it renders the schemas of tools.
        tool_calls: it renders tool calls, with names, argument names and values.
        opening: the text of its own that it puts before the first message (a default system prompt).
    """

    prompts: dict[str, tuple[str, ...]]
    headers: tuple[str, ...]
    ends: tuple[str, ...]
    stops: tuple[str, ...]
    by_next: bool
    tools: bool
    tool_calls: bool
    opening: str


@dataclass(slots=True)
class Layout:
    """Where the texts of one conversation stand in its render.

    Attributes:
        text: the render, without marks.
        marks: (position, message, kind) in the order of the text. Kinds: `c` and `d` around content, `r` and `s` around
            reasoning, `a` and `b` around a string in the arguments of a tool call.
        outside: for each message, the parts of its content before and after its marks (blanks, or a tag).
        arguments: whether arguments were marked.
    """

    text: str
    marks: list[tuple[int, int, str]]
    outside: list[tuple[str, str]]
    arguments: bool

    def texts(self, messages: Sequence[Message]) -> list[Span]:
        """Character ranges, in order, of the content of messages that are not the assistant's."""
        spans, open_at = [], {}
        for position, i, kind in self.marks:
            if messages[i]["role"] == "assistant":
                continue
            head, tail = self.outside[i]
            if kind == "c":
                open_at[i] = position - len(head) if self.text.endswith(head, 0, position) else position
            elif kind == "d" and i in open_at:
                end = position + len(tail) if self.text.startswith(tail, position) else position
                spans.append((open_at.pop(i), end))
        return sorted(spans)


@dataclass(slots=True)
class Answer:
    """What the model has to produce for one assistant message: characters `begin` to `end`, closed from `close` on."""

    message: int
    begin: int
    close: int
    end: int


def lay_out(render: Render, messages: Sequence[Message], tools: list | None, text: str, **options: Any) -> Layout:
    """Find where the text of each message stands in `text`, the render of `messages`.

    Raises:
        MaskError: the template rewrites the texts, so that they can't be followed, or the text contains the marks.
    """
    if _RESERVED.search(text):
        raise MaskError("the text contains one of the private-use characters U+10FDD0, U+10FDD1, U+10FDE0, U+10FDE1")
    for arguments, inner in ((True, False), (True, True), (False, False), (False, True)):
        marked, outside = _marked(messages, arguments, inner)
        pieces = _MARK.split(render(marked, tools, **options))
        if "".join(pieces[::3]) == text:
            marks, position = [], 0
            for k in range(1, len(pieces), 3):
                position += len(pieces[k - 1])
                marks.append((position, int(pieces[k]), pieces[k + 1].lower()))
            return Layout(text, marks, outside, arguments)
    raise MaskError(
        "the chat template rewrites the text of the messages, so the answers can't be found in what it renders",
        "use a template that renders texts as they are",
    )


def _marked(messages: Sequence[Message], arguments: bool, inner: bool) -> tuple[list[Message], list[tuple[str, str]]]:
    """Copies of the messages with marks around their texts, and what of each content stands outside its marks."""
    result, outside = [], []
    for i, message in enumerate(messages):
        copy, parts = dict(message), ("", "")
        if message.get("content"):
            copy["content"], parts = _wrap(message["content"], i, "cd", inner and message["role"] != "assistant")
        if message.get("reasoning_content"):
            copy["reasoning_content"] = _wrap(message["reasoning_content"], i, "rs")[0]
        if arguments and message.get("tool_calls"):
            copy["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _wrap_leaves(call["function"]["arguments"], i)}}
                for call in message["tool_calls"]
            ]
        result.append(copy)
        outside.append(parts)
    return result, outside


def _wrap(text: str, message: int, kinds: str, inner: bool = False) -> tuple[str, tuple[str, str]]:
    """Put marks around a text inside its outer blanks (and tags), where trimming and comparing don't meet them."""
    core = text.strip()
    if not core:
        return text, ("", text)
    begin = text.index(core)
    end = begin + len(core)
    if inner and (tags := _TAGS.fullmatch(text)):
        begin, end = tags.span(1)
    opening, closing = (f"{MARK_OPEN}{message}{kind}{MARK_CLOSE}" for kind in kinds)
    return text[:begin] + opening + text[begin:end] + closing + text[end:], (text[:begin], text[end:])


def _wrap_leaves(value: Any, message: int) -> Any:
    if isinstance(value, str):
        return _wrap(value, message, "ab")[0]
    if isinstance(value, dict):
        return {key: _wrap_leaves(item, message) for key, item in value.items()}
    if isinstance(value, list):
        return [_wrap_leaves(item, message) for item in value]
    return value


def answers(
    layout: Layout, messages: Sequence[Message], scaffold: Scaffold, prompt_before: Callable[[int], str]
) -> Iterator[Answer]:
    """What the model has to produce for each assistant message, in order.

    An answer begins where the generation prompt ends and ends after its end-of-turn token. Both are searched for only
    between the marks of texts, so nothing that a text spells is taken for scaffold.

    Args:
        layout: where the texts stand.
        messages: the messages, as laid out.
        scaffold: what the template writes around texts.
        prompt_before: renders the messages before i with the generation prompt, for the template that doesn't write the
            same before every answer.

    Raises:
        MaskError: a beginning or an end can't be found.
    """
    text = layout.text
    first, last = _extents(layout, len(messages))
    until, limit = [0] * len(messages), len(text)  # where the texts of the messages after i begin
    for i in range(len(messages) - 1, -1, -1):
        until[i] = limit
        limit = min(limit, first.get(i, limit))
    ends = re.compile("|".join(map(re.escape, sorted(scaffold.ends, key=len, reverse=True))) or "(?!)")
    at, before, joined = 0, "", False  # end of the messages so far, the role and the rest of the one that ends there
    rest = ""
    for i, message in enumerate(messages):
        if i in first and (first[i] < at or last[i] > until[i]):
            raise MaskError(f"the chat template moves the text of message {i + 1} out of its order")
        if message["role"] != "assistant":
            if i in last:
                at, before, rest = last[i], message["role"], layout.outside[i][1]
            else:  # a message without text: its turn begins after `at`, but where it ends can't be told
                before = rest = ""
            continue
        room = first.get(i, until[i])
        begin = at if joined else _beginning(text, at, room, before, rest, scaffold)
        if begin < 0:
            prompt = prompt_before(i)
            if not (prompt and text.startswith(prompt) and at <= len(prompt) <= room):
                raise MaskError(f"the generation prompt does not stand before assistant message {i + 1}")
            begin = len(prompt)
        own = max(begin, last.get(i, begin))  # the end of the message's own texts
        follower = messages[i + 1]["role"] if i + 1 < len(messages) else ""
        found = ends.search(text, own, until[i])
        header = _find(text, scaffold.headers, own, until[i]) if follower == "assistant" else -1
        joined = False
        if found and not 0 <= header < found.start():
            close, end = found.span()
        elif follower == "assistant" and header < 0:  # the template writes both messages as one turn
            close = end = own
            joined = True
        elif scaffold.by_next and (header >= 0 or not follower):
            close = end = own + len(text[own : until[i] if header < 0 else header].rstrip())
        else:
            raise MaskError(
                f"no end-of-turn token stands after assistant message {i + 1}",
                "use a template that closes every assistant turn with the token on which generation stops",
            )
        yield Answer(i, begin, close, end)
        at, before, rest = end, "assistant", ""


def _extents(layout: Layout, count: int) -> tuple[dict[int, int], dict[int, int]]:
    """The first and the last mark of each message."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, i, _ in layout.marks:
        first.setdefault(i, position)
        last[i] = position
    return first, last


def _beginning(text: str, at: int, room: int, before: str, rest: str, scaffold: Scaffold) -> int:
    """Where the answer begins: after `at`, where the message before ends but for its `rest`, before `room`; or -1."""
    for prompt in scaffold.prompts.get(before, ()):
        for skipped in dict.fromkeys((len(rest), len(rest.rstrip()), *range(len(rest)))):
            end = at + skipped + len(prompt)
            if end <= room and text.startswith(prompt, at + skipped):
                # A template may write a header that its own generation prompt lacks; the model never writes one.
                return next((end + len(h) for h in scaffold.headers if text.startswith(h, end, room)), end)
    for header in scaffold.headers:
        found = text.find(header, at, room)
        if found >= 0:
            return found + len(header)
    return -1


def _find(text: str, parts: Sequence[str], begin: int, end: int) -> int:
    return min((at for part in parts if (at := text.find(part, begin, end)) >= 0), default=-1)


def within(answers: Sequence[Answer], native: Sequence[Span]) -> list[Span]:
    """The parts of the answers that the template marks, with the end of turn wherever it marks a part of the answer."""
    spans, at = [], 0
    for answer in answers:
        while at < len(native) and native[at][1] <= answer.begin:
            at += 1
        inside = at
        while inside < len(native) and native[inside][0] < answer.end:
            begin, end = native[inside]
            spans.append((max(begin, answer.begin), min(end, answer.end)))
            inside += 1
        if inside > at and answer.close < answer.end:
            spans.append((max(answer.close, spans[-1][1]), answer.end))
        at = inside
    return [(begin, end) for begin, end in spans if begin < end]


def covered(offsets: np.ndarray, spans: Sequence[Span]) -> list[bool]:
    """Which tokens (by their character ranges, in order) hold a character of one of the spans."""
    begins, ends = offsets.T
    trained = np.zeros(len(offsets), bool)
    firsts = np.searchsorted(ends, [begin for begin, _ in spans], side="right")
    stops = np.searchsorted(begins, [end for _, end in spans], side="left")
    for first, stop in zip(firsts, stops, strict=True):
        trained[first:stop] = True
    return trained.tolist()
