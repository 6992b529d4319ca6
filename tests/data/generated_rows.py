"""Hypothesis strategies: rows of every form that litft reads, in any spelling, with odd text; ways to spoil them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from templates_helpers import SPECIAL, TOOLS

PIECES = [
    *(
        "the weather ",
        "42",
        "I am ",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        ".",
        ",",
        '"',
        "'",
        "\\",
        "]}",
        "None",
        "%",
    ),
    *(
        "é",
        "e\u0301",
        "漢字",
        "🙂",
        "👨\u200d👩\u200d👧",
        "שלום",
        "\u202e",
        "\u200b",
        "\ufeff",
        "\u2028",
        "\x85",
        "\ufffd",
    ),
    *("\0", "\x1b[31m", "\x07", "\x1f", "\U0010ffff", "\ue000", "{{ 7 * 7 }}", "{% raw %}", "{#", "<", "|>", "###"),
    *("<think>", "</think>", "<tool_call>", "</tool_response>", "[INST]", "User:", "<|im_start|>assistant\n"),
    *("<|im_end|>", "<eos>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|start|>", "<|end|>", "<bos>"),
]
LONG = ["a" * 3000, " " * 500, "\n" * 300, "é" * 900, "<|im_end|>" * 40, "=" * 2000, "\u200b" * 400, "0123456789" * 100]
TEXT = st.lists(st.sampled_from(PIECES), max_size=5)
SOMETIMES = st.integers(0, 9)  # 0 is the simplest: what is rare is asked for by a high number


@dataclass
class Case:
    """A generated row.

    Attributes:
        form: as litft calls it, or how it was spelled.
        value: the row as JSON has it.
        messages: what it should be read as; `train`, `tools` and `text` likewise.
        spoiled: it may be bad, in whatever way.
        name: of its file, which tells the format.
        body: its bytes in the file.
    """

    form: str
    value: Any
    messages: list[dict[str, Any]] = field(default_factory=list)
    train: list[bool | None] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    spoiled: bool = False
    name: str = "a.jsonl"
    body: bytes = b""


def _text(draw: Callable, mark: str) -> str:
    """Odd text with a mark that occurs nowhere else."""
    pieces = draw(TEXT)
    if draw(SOMETIMES) == 9:
        pieces.append(draw(st.sampled_from(LONG)))
    pieces.insert(draw(st.integers(0, len(pieces))), mark)
    return "".join(pieces)


def _chat(draw: Callable, case: Case, plain: bool) -> None:
    """Fill in the conversation; a plain one has users and answers only."""
    messages = case.messages
    if not plain and draw(SOMETIMES) > 6:
        messages.append({"role": "system", "content": _text(draw, "Zs0Z")})
    with_calls = not plain and draw(SOMETIMES) > 7
    if with_calls:
        case.tools = copy.deepcopy(TOOLS)
    for turn in range(draw(st.integers(1, 3))):
        asked = "" if draw(SOMETIMES) == 9 else _text(draw, f"Zq{turn}Z")
        messages.append({"role": "user", "content": asked})
        if with_calls and draw(st.booleans()):
            calls = []
            for number in range(draw(st.integers(1, 2))):
                arguments = {
                    "city": _text(draw, f"Zc{turn}{number}Z"),
                    "n": draw(st.sampled_from([None, 3, True, [1.5]])),
                }
                function = {"name": "get_weather", "arguments": arguments}
                calls.append({"type": "function", "id": f"call0000{number}", "function": function})
            beside = _text(draw, f"Zb{turn}Z") if draw(SOMETIMES) == 9 else ""
            messages.append({"role": "assistant", "content": beside, "tool_calls": calls})
            for number in range(len(calls)):
                reply = {"role": "tool", "content": _text(draw, f"Zt{turn}{number}Z"), "name": "get_weather"}
                messages.append({**reply, "tool_call_id": f"call0000{number}"})
        messages.append({"role": "assistant", "content": _text(draw, f"Za{turn}Z")})
        if not plain and draw(SOMETIMES) > 7:
            messages[-1]["reasoning_content"] = _text(draw, f"Zr{turn}Z")
            if draw(SOMETIMES) == 9:
                messages[-1]["content"] = ""
    case.train = [None] * len(messages)
    if not plain and draw(SOMETIMES) > 7:
        for i in range(len(messages) - 1):
            if messages[i]["role"] == "assistant":
                case.train[i] = draw(st.sampled_from([None, False, True]))


ROLES = {
    "system": ["system", "developer", "SYSTEM"],
    "user": ["user", "human", "User"],
    "assistant": ["assistant", "gpt", "model", "bot", "Assistant"],
    "tool": ["tool", "function", "observation", "ipython"],
}


def _spelled(draw: Callable, message: dict[str, Any], train: bool | None, share: bool) -> dict[str, Any]:
    """A message in one of its spellings."""
    content: Any = message["content"]
    how = draw(SOMETIMES)
    if not content and how > 4:
        content = None
    elif how > 7:
        cut = draw(st.integers(0, len(content)))
        content = [
            {"type": "text", "text": content[:cut]},
            draw(st.sampled_from([content[cut:], {"text": content[cut:]}])),
        ]
    role = draw(st.sampled_from(ROLES[message["role"]]))
    spelled = {"from": role, "value": content} if share else {"role": role, "content": content}
    for key in ("name", "tool_call_id"):
        if key in message:
            spelled[key] = message[key]
    if "reasoning_content" in message:
        key = draw(st.sampled_from(["reasoning_content", "reasoning", "thinking"]))
        spelled[key] = message["reasoning_content"]
    if calls := message.get("tool_calls"):
        calls = copy.deepcopy(calls)
        for call in calls:
            if draw(st.booleans()):
                call["function"]["arguments"] = json.dumps(
                    call["function"]["arguments"], ensure_ascii=draw(st.booleans())
                )
        spelled["tool_calls"] = json.dumps(calls) if draw(SOMETIMES) > 7 else calls
    if train is not None:
        key = draw(st.sampled_from(["train", "trainable", "weight"]))
        spelled[key] = int(train) if key == "weight" else train
    if draw(SOMETIMES) == 9:
        spelled |= {"id": "7", "name": spelled.get("name")}
    return spelled


FORMS = [
    "messages",
    "messages",
    "messages",
    "list",
    "json",
    "sharegpt",
    "sharegpt",
    "alpaca",
    "prompt",
    "sides",
    "text",
]


@st.composite
def good_rows(draw: Callable) -> Case:
    """A row that should be read, unless a template can't write it."""
    form = draw(st.sampled_from(FORMS))
    case = Case(form, {})
    if form == "text":
        case.text = _text(draw, "Zx0Z")
        case.value = {"text": case.text, "url": None}
        return case
    _chat(draw, case, plain=form in ("alpaca", "prompt"))
    if form == "prompt":
        case.messages, case.train = case.messages[-2:], [None, None]
        asked, answer = (message["content"] for message in case.messages)
        case.value = {"prompt": asked, "completion": answer}
        return case
    if form == "alpaca":
        *early, asked, answer = (message["content"] for message in case.messages)
        first, _, more = asked.partition("\n")
        split = {"instruction": first, "input": more} if first and more else {"instruction": asked}
        case.value = {**split, "output": answer, "history": [early[i : i + 2] for i in range(0, len(early), 2)]}
        return case
    pairs = zip(case.messages, case.train, strict=True)
    spelled = [_spelled(draw, message, train, form == "sharegpt") for message, train in pairs]
    if form == "sides":
        case.value = {"prompt": spelled[:-1], "completion": spelled[-1:]}
        early = zip(case.messages[:-1], case.train[:-1], strict=True)
        case.train[:-1] = [False if t is None and m["role"] == "assistant" else t for m, t in early]
    elif form == "list" and not case.tools:
        case.value = spelled
        return case
    else:
        case.value = {"conversations" if form == "sharegpt" else "messages": spelled}
        if form == "json":
            case.value["messages"] = json.dumps(spelled, ensure_ascii=draw(st.booleans()))
    if case.tools:
        bare = [tool["function"] for tool in case.tools]
        case.value |= draw(st.sampled_from([{"tools": case.tools}, {"tools": json.dumps(bare)}, {"functions": bare}]))
    if draw(SOMETIMES) > 6:
        case.value |= {"id": 7, "meta": {"a": None, "b": [{}]}, "source": "x"}
    return case


DEEP = "[" * 30 + "]" * 30
VALUES = [None, True, 0, -1, 3.5, 10**30, "", " ", "x", [], {}, [[]], ["x"], [{"role": "user"}], {"a": {"b": None}}]
VALUES += [
    "\ud800",
    "a\udfff",
    "null",
    "[",
    "{}",
    float("nan"),
    float("inf"),
    json.loads(DEEP),
    SPECIAL[0],
    "\U0010fdd0",
]
KEYS = ["messages", "conversations", "role", "from", "content", "value", "text", "prompt", "completion", "instruction"]
KEYS += [
    "output",
    "history",
    "tools",
    "system",
    "tool_calls",
    "train",
    "weight",
    "images",
    "chosen",
    "rejected",
    "label",
]
ODD_ROLES = ["robot", "", "assistent", "function_call", None, 7, "tool", "system", "assistant", "user"]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every key and index inside a value, with its container."""
    inside = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [place for key, item in inside for place in ((value, key), *_places(item))]


def _spoil(draw: Callable, value: Any) -> Any:
    """The row with one thing changed."""
    value = {"row": copy.deepcopy(value)}
    box, key = draw(st.sampled_from(_places(value)))
    way = draw(st.sampled_from(["replace", "delete", "rename", "twice", "wrap", "add", "role", "text"]))
    if way == "replace":
        box[key] = draw(st.sampled_from(VALUES))
    elif way == "delete" and box is not value:
        del box[key]
    elif way == "rename" and isinstance(box, dict) and box is not value:
        box[draw(st.sampled_from([key + "s", key[:-1], key.upper(), "", "\ud800"]))] = box.pop(key)
    elif way == "twice" and isinstance(box, list):
        box.insert(key, copy.deepcopy(box[key]))
    elif way == "wrap":
        box[key] = draw(st.sampled_from([[box[key]], {"value": box[key]}, [[box[key]]], json.dumps(box[key])]))
    elif way == "add" and isinstance(box[key], dict):
        box[key][draw(st.sampled_from(KEYS))] = draw(st.sampled_from(VALUES))
    elif way == "role" and isinstance(box, dict) and box is not value:
        box["from" if "from" in box else "role"] = draw(st.sampled_from(ODD_ROLES))
    elif isinstance(box[key], str):
        at = draw(st.integers(0, len(box[key])))
        box[key] = (
            box[key][:at]
            + draw(st.sampled_from(["\ud800", "\udc00", "\U0010fdd1", "\0", "<|im_end|>"]))
            + box[key][at:]
        )
    return value["row"]


BYTES = [b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r", b'"', b",", b"}", b"]", b"{", b"\xef\xbb\xbf", b"NaN", b"\\"]
BYTES += [
    b"\\ud800",
    b"  ",
    b"\t",
    b"'",
    b"1e999",
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 2000,
    b"// \n",
    b'"a": 1, "a": 2, ',
]


def _garble(draw: Callable, body: bytes) -> bytes:
    """The bytes with one thing changed; some changes do no harm."""
    way = draw(
        st.sampled_from(
            ["insert", "insert", "cut", "drop", "double", "comma", "key", "quotes", "bom", "blanks", "return"]
        )
    )
    at = draw(st.integers(0, len(body)))
    if way == "cut":
        return body[:at]
    if way == "drop":
        return body[:at] + body[at + draw(st.integers(1, 9)) :]
    if way == "insert":
        return body[:at] + draw(st.sampled_from(BYTES)) + body[at:]
    whole = {
        "double": body + body,
        "comma": body[:-1] + b"," + body[-1:],
        "key": body.replace(b"{", b'{"id": 1, "id": 2, ', 1),
        "quotes": body.replace(b'"', b"'"),
        "bom": b"\xef\xbb\xbf" + body,
        "blanks": b" \t" + body + b"  ",
        "return": body + b"\r",
    }
    return whole[way]


@st.composite
def rows(draw: Callable) -> Case:
    """A row as it stands in a file: every other one spoiled in one or several ways."""
    case = draw(good_rows())
    ascii, how = draw(st.booleans()), draw(SOMETIMES)
    for _ in range({5: 1, 6: 1, 7: 1, 8: 3}.get(how, 0)):
        case.value, case.spoiled = _spoil(draw, case.value), True
    case.body = json.dumps(case.value, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    if how == 9:
        case.body, case.spoiled = _garble(draw, case.body), True
    elif draw(SOMETIMES) > 7:
        case.name = "a.json"
    return case
