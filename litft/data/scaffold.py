"""What a chat template writes around the texts, learned from a few small chats rendered once per template."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from litft.data.conversation import Message
from litft.data.masks import MaskError, Render, Scaffold, answers, lay_out

_NO_THINKING = {"enable_thinking": False, "thinking": False}  # what the templates call it
_USER: Message = {"role": "user", "content": "litft question"}
_ANSWER: Message = {"role": "assistant", "content": "litft answer"}
_TOOL: Message = {"role": "tool", "content": "litft result", "name": "litft_name", "tool_call_id": "litft0001"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "litft0001",
            "function": {"name": "litft_name", "arguments": {"litft_key": "litft value"}},
        }
    ],
}
_SCHEMA = {
    "type": "function",
    "function": {
        "name": "litft_name",
        "description": "litft description",
        "parameters": {
            "type": "object",
            "properties": {"litft_key": {"type": "string", "description": "litft argument"}},
            "required": ["litft_key"],
        },
    },
}


@dataclass(slots=True, frozen=True)
class Form:
    """In which form a template takes the messages.

    Attributes:
        parts: content as `[{"type": "text", "text": ...}]`, not as a string.
        json_arguments: the arguments of tool calls as a JSON string, not as a mapping.
    """

    parts: bool = False
    json_arguments: bool = False

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in that form, with reasoning under both names that templates read."""
        return [self._shape(message) for message in messages]

    def _shape(self, message: Message) -> Message:
        # Nulls are rendered as "None" by some templates, empty tool_calls as a call by others.
        shaped = {
            key: value for key, value in message.items() if value is not None and (key, value) != ("tool_calls", [])
        }
        if self.parts and isinstance(shaped.get("content"), str):
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        if "reasoning_content" in shaped:
            shaped.setdefault("thinking", shaped["reasoning_content"])
        if shaped.get("tool_calls"):
            shaped["tool_calls"] = [_with_arguments(call, self.json_arguments) for call in shaped["tool_calls"]]
        return shaped


def _with_arguments(call: dict, json_string: bool) -> dict:
    arguments = call["function"]["arguments"]
    if json_string and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not json_string and isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def find_form(render: Render) -> Form:
    """Find by trial in which form the template takes content and tool arguments.

    Args:
        render: `render(messages, tools, form=...)`.

    Raises:
        MaskError: it renders the text of a message in neither form.
    """
    parts, refusal = False, None
    for parts in (False, True):
        try:
            if _USER["content"] in render([_USER], None, form=Form(parts)).lower():
                break
        except MaskError as error:
            refusal = refusal or error
    else:
        raise refusal or MaskError("the chat template does not render the text of a user message")
    chat, value = [_USER, _CALL, _TOOL], '"litft_key": "litft value"'
    as_mapping = _try(render, chat, [_SCHEMA], form=Form(parts))
    as_json = _try(render, chat, [_SCHEMA], form=Form(parts, True))
    python_repr = as_mapping is not None and "'litft_key': 'litft value'" in as_mapping
    wants_json = as_json is not None and value in as_json and (as_mapping is None or python_repr)
    return Form(parts, wants_json)


def learn(render: Render, special_tokens: Sequence[str]) -> Scaffold:
    """Learn the scaffold of a template.

    Args:
        render: `render(messages, tools, prompt=False, **variables)`.
        special_tokens: the tokenizer's special tokens, longest first.

    Raises:
        MaskError: the template refuses even a question and an answer, or writes no end-of-turn token.
    """
    ask, chat = [_USER], [_USER, _ANSWER]
    chats: list[tuple[list[Message], list | None]] = [(chat, None)]
    gaps, between, opening = [_gap(render, chat, 0)], "", ""
    long = [*chat, {**_USER, "content": "litft follow-up"}, {**_ANSWER, "content": "litft second"}]
    with contextlib.suppress(MaskError):  # a template may hold one question and one answer only
        gaps += [_gap(render, long, 0), _gap(render, long, 2)]
        between = _gap(render, long, 1)
        opening = _own_text(_before(render, ask), between, special_tokens)
        chats.append((long, None))
    prompts = {"user": _prompts(render, ask, None, gaps)}
    prompt = prompts["user"][0]
    shared = _common(prompt, _after(render, ask))  # the end of the user's turn
    headers = _unique(p[shared:] for p in prompts["user"] if p.startswith(prompt[:shared]))

    closing, closing_last = _after(render, chat, prompt=True), _after(render, chat)
    header = next((h for h in headers if closing.endswith(h)), "")
    closing = closing.removesuffix(header) if header else between[: _common(between, closing_last)] or closing_last
    end, end_last = closing.strip(), closing_last.strip()
    if end and end_last.startswith(end):
        end_last = end
    ends = [e for e in (end_last, end) if e]
    stops = [end_last] if end_last else ends[:1]
    by_next = not ends
    if by_next and (mark := _first_special(between, special_tokens)):
        ends, stops = [mark], [mark]
    if not ends:
        raise MaskError(
            "the chat template writes no end-of-turn token after an answer, so the model would never learn to stop",
            "name another with data.chat_template (a Jinja file, or chatml)",
        )
    rest = closing[len(closing.rstrip()) :]
    prompts["assistant"] = _unique((rest + headers[0], *map(rest.__add__, headers))) if headers else (rest,)

    called, told = [_USER, _CALL], [_USER, _CALL, _TOOL]
    alone, rendered = _try(render, called, [_SCHEMA]), _try(render, told, [_SCHEMA])
    asked = _try(render, ask, [_SCHEMA])
    tools = asked is not None and all(s in asked for s in ("litft_name", "litft description", "litft_key"))
    call = (alone or "").partition(str(_USER["content"]))[2]
    tool_calls = all(s in call for s in ("litft_name", "litft_key", "litft value"))
    if tool_calls and rendered and str(_TOOL["content"]) in rendered:
        last, middle = _after(render, called, [_SCHEMA]), _gap(render, told, 1, [_SCHEMA])
        close = middle[: _common(middle, last)].rstrip()
        if not any(close.endswith(e) for e in ends):
            rest = middle[len(close) :]
            mark = _first_special(rest, special_tokens) if by_next else _last_special(close, special_tokens)
            ends += [mark] if mark else []
            stops = [*stops, mark] if mark else stops
        answered = [*told, _ANSWER]
        gaps = [_gap(render, answered, 2, [_SCHEMA])] if _try(render, answered, [_SCHEMA]) else []
        prompts["tool"] = _prompts(render, told, [_SCHEMA], gaps)
        if gaps:
            chats.append((answered, [_SCHEMA]))
    scaffold = Scaffold(prompts, headers, _unique(ends), _unique(stops), by_next, tools, tool_calls, opening)
    for messages, offered in chats:
        _check(render, messages, offered, scaffold)
    return scaffold


def _check(render: Render, messages: list[Message], tools: list | None, scaffold: Scaffold) -> None:
    """Hold the scaffold against the template's own generation prompts, wherever an answer goes on from one."""
    layout = lay_out(render, messages, tools, render(messages, tools))
    prompts = [_try(render, messages[:i], tools, prompt=True) or "" for i in range(len(messages))]
    for answer in answers(layout, messages, scaffold, prompts.__getitem__):
        prompt = prompts[answer.message]
        if prompt and layout.text.startswith(prompt):
            extra = layout.text[len(prompt) : answer.begin]
            if answer.begin < len(prompt) or (extra and extra not in scaffold.headers):
                raise MaskError("the chat template's answers do not begin where its generation prompt ends")


def _try(render: Render, messages: Sequence[Message], tools: list | None, **options: Any) -> str | None:
    try:
        return render(messages, tools, **options)
    except MaskError:
        return None


def _after(render: Render, messages: Sequence[Message], tools: list | None = None, **options: Any) -> str:
    """What the template writes after the text of the last message."""
    layout = lay_out(render, messages, tools, render(messages, tools, **options), **options)
    positions = [position for position, i, _ in layout.marks if i == len(messages) - 1]
    if not positions:
        raise MaskError(f"the chat template does not render the text of a message of role {messages[-1]['role']}")
    return layout.text[max(positions) :]


def _before(render: Render, messages: Sequence[Message]) -> str:
    """What the template writes before the first text."""
    layout = lay_out(render, messages, None, render(messages, None))
    return layout.text[: layout.marks[0][0]]


def _gap(render: Render, messages: Sequence[Message], i: int, tools: list | None = None) -> str:
    """What the template writes between the texts of messages i and i + 1."""
    layout = lay_out(render, messages, tools, render(messages, tools))
    begin = max((position for position, at, _ in layout.marks if at == i), default=None)
    end = min((position for position, at, _ in layout.marks if at == i + 1), default=None)
    if begin is None or end is None or begin > end:
        raise MaskError("the chat template does not render every message in its place")
    return layout.text[begin:end]


def _prompts(render: Render, messages: list[Message], tools: list | None, gaps: Sequence[str]) -> tuple[str, ...]:
    """The generation prompt after `messages`, the one without thinking, and what of it stands before real answers."""
    prompt = _after(render, messages, tools, prompt=True)
    try:
        other = _after(render, messages, tools, prompt=True, **_NO_THINKING)
    except MaskError:
        other = prompt
    turn = _common(prompt, _after(render, messages, tools))  # the end of the message before
    parts = {prompt[: _common(prompt, gap)] for gap in (*gaps, other)}
    parts = {part for part in parts if part[turn:].strip()}
    return tuple(dict.fromkeys((prompt, other, *sorted(parts, key=len, reverse=True))))


def _own_text(opening: str, between: str, special_tokens: Sequence[str]) -> str:
    """Words of the template's own in what it writes before the first message (not the header of the user's turn)."""
    n = next((k for k, (x, y) in enumerate(zip(opening[::-1], between[::-1], strict=False)) if x != y), len(between))
    text = opening[: max(0, len(opening) - n)]
    words = text
    for token in special_tokens:
        words = words.replace(token, " ")
    return text if re.search(r"\w\s+\w", words) else ""


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning that does not end inside a tag."""
    n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    for opening, closing in (("<", ">"), ("[", "]")):
        at = a.rfind(opening, 0, n)
        if at >= 0 and closing not in a[at:n] and closing in a[n:]:
            n = at
    return n


def _unique(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part for part in parts if part.strip()))


def _first_special(text: str, tokens: Sequence[str]) -> str:
    found = re.search("|".join(map(re.escape, tokens)) or "(?!)", text)
    return found.group() if found else ""


def _last_special(text: str, tokens: Sequence[str]) -> str:
    return next((token for token in tokens if text.endswith(token)), "")
