"""Whether a template renders all of a conversation: what it leaves out is an error, or is said where it means to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from litft.data.conversation import Message
from litft.data.masks import Answer, Layout, MaskError, Scaffold


def check_texts(layout: Layout, messages: Sequence[Message], tools: list | None, scaffold: Scaffold) -> None:
    """Refuse a conversation of which the template leaves something out."""
    if tools and not scaffold.tools:
        raise MaskError("the chat template does not render tools", "use a template that does, or remove the tools")
    marks = Counter((i, kind) for _, i, kind in layout.marks)
    for i, message in enumerate(messages):
        role, calls = message["role"], message.get("tool_calls")
        if calls and not scaffold.tool_calls:
            raise MaskError(
                f"the chat template does not render tool_calls (message {i + 1})",
                "use a template that does, or write the calls into the content",
            )
        # An answer may lose its beginning: reasoning inside the content is cut off or moved.
        needed = ["d"] if role == "assistant" else ["c", "d"]
        if (message.get("content") or "").strip() and not all(marks[i, kind] for kind in needed):
            whole = "all of " if marks[i, "c"] or marks[i, "d"] else ""
            beside = " beside its tool_calls" if calls else ""
            raise MaskError(
                f"the chat template does not render {whole}the content of message {i + 1} ({role}){beside}",
                "use a template that does, or remove the message's content",
            )
        for call in calls or ():
            keys, strings = leaves(call["function"]["arguments"])
            if any(end in key for key in (call["function"]["name"], *keys) for end in scaffold.ends):
                raise MaskError(f"a function or argument name in message {i + 1} contains an end-of-turn token")
            marks[i, "a"] -= sum(1 for text in strings if text.strip())
        if layout.arguments and marks[i, "a"] < 0:
            raise MaskError(f"the chat template does not render all tool_calls of message {i + 1}")


def leaves(value: Any) -> tuple[list[str], list[str]]:
    """The keys and the strings in a nested value."""
    if isinstance(value, str):
        return [], [value]
    keys: list[str] = list(value) if isinstance(value, dict) else []
    strings: list[str] = []
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        more = leaves(item)
        keys += more[0]
        strings += more[1]
    return keys, strings


def check_calls(text: str, answer: Answer, message: Message) -> None:
    """Refuse an answer that does not name all the functions it calls."""
    names = Counter(call["function"]["name"] for call in message.get("tool_calls") or ())
    for name, times in names.items():
        if text.count(name, answer.begin, answer.end) < times:
            raise MaskError(f"the chat template does not render all tool_calls of message {answer.message + 1}")


def check_said(layout: Layout, answer: Answer, message: Message) -> None:
    """Refuse an answer of nothing but reasoning that the template leaves out: only its end would be trained."""
    if message.get("tool_calls"):
        return
    thought, said = _inline_reasoning(message)
    if said.strip() or (thought and thought in layout.text[answer.begin : answer.close]):
        return
    if not any(i == answer.message and kind in "crs" for _, i, kind in layout.marks):  # c: all of the content is there
        raise MaskError(
            f"assistant message {answer.message + 1} is empty but for reasoning, which the chat template leaves out",
            "give it text, or give it train: false",
        )


def _inline_reasoning(message: Message) -> tuple[str, str]:
    """The reasoning that stands inside the content, and the text after it."""
    content = message.get("content") or ""
    thought, closed, said = content.rpartition("</think>")
    return (thought.rpartition("<think>")[2].strip(), said) if closed else ("", content)


def notes(
    layout: Layout,
    answers: Sequence[Answer],
    wanted: Sequence[bool],
    messages: Sequence[Message],
    scaffold: Scaffold,
) -> tuple[str, ...]:
    """What the template leaves out of a row by its own rules."""
    found = []
    reasoned = {i for _, i, kind in layout.marks if kind in "rs"}
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for answer in answers:
        i, message = answer.message, messages[answer.message]
        # Reasoning before the last question is dropped by many templates, as it is when the model is served.
        if wanted[i] and i > asked:
            thought, _ = _inline_reasoning(message)
            lost = message.get("reasoning_content") and i not in reasoned
            if lost or thought not in layout.text[answer.begin : answer.end]:
                found.append("the chat template does not render the reasoning of the last answer")
        if wanted[i] and scaffold.by_next and answer.close == answer.end:
            found.append(
                "the chat template writes no end-of-turn token after the last answer, so none is trained there"
            )
    return tuple(dict.fromkeys(found))
