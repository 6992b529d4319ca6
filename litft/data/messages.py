"""One message of a row, in whatever spelling, to the canonical `Message` that chat templates take.

Both spellings are read, role/content and from/value, in one list too. Keys with a null value count as absent. Errors
name the message by its number from 1; `litft.data.rows` adds file and line.
"""

from __future__ import annotations

import json
from typing import Any

from litft.data.conversation import Message
from litft.data.jsontext import kind, nearest, parse_json, snippet
from litft.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's later name for it
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "function_call",  # an assistant turn whose text is the call
    "tool_call": "function_call",
}

_REASONING = ("reasoning_content", "thinking", "reasoning")
_TRAIN = ("train", "trainable", "weight")
_CALLS = ("tool_calls", "function_call")
_KNOWN = {"role", "from", "content", "value", "name", "tool_call_id", "id", *_REASONING, *_TRAIN, *_CALLS}
_TEXT_PARTS = ("text", "input_text", "output_text")
_MEDIA = {
    "image": "images are",
    "audio": "audio is",
    "video": "videos are",
    "file": "files are",
    "document": "files are",
}
_MEDIA_KEYS = ("image", "images", "audio", "audios", "video", "videos")


def is_message(value: Any) -> bool:
    """Whether a value looks like a message: an object with a role."""
    return isinstance(value, dict) and ("role" in value or "from" in value)


def to_messages(items: Any, what: str = "message") -> tuple[list[Message], list[bool | None]]:
    """Read a list of messages.

    Args:
        items: the list, or its JSON text.
        what: how errors call one of them.

    Returns:
        The canonical messages, and for each whether the row says to train it (None: says nothing).

    Raises:
        DataError: without file and line.
    """
    if isinstance(items, str):
        items = from_json(items, f"{what}s")
    if not isinstance(items, list):
        raise DataError(f"{what}s must be a list, not {kind(items)}", mend='write [{"role": ..., "content": ...}, ...]')
    pairs = [_message(item, f"{what} {number}") for number, item in enumerate(items, start=1)]
    return [message for message, _ in pairs], [train for _, train in pairs]


def to_tools(value: Any) -> list[dict[str, Any]] | None:
    """Read the functions on offer: a list or its JSON text; a bare function is wrapped as serving APIs wrap it.

    Raises:
        DataError: without file and line.
    """
    if isinstance(value, str):
        value = from_json(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise DataError(f"tools must be a list, not {kind(value)}", mend="write a list of function schemas")
    tools = []
    for number, tool in enumerate(value, start=1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            mend = 'write {"type": "function", "function": {"name": ..., "parameters": ...}}'
            raise DataError(f"tool {number} is not the schema of a function", mend=mend, snippet=shown(tool))
        tools.append(_clean(tool if "function" in tool else {"type": "function", "function": tool}, f"tool {number}"))
    return tools


def refuse_media(value: dict[str, Any], what: str) -> None:
    """Raise for an object with images, audio or video beside its text.

    Raises:
        DataError: without file and line.
    """
    for key in _MEDIA_KEYS:
        if value.get(key):
            mend = f"remove {key!r} to train on the text alone, or leave the row out"
            raise DataError(f"{_MEDIA[key.removesuffix('s')]} not supported yet: {what} has {key!r}", mend=mend)


def text_of(value: Any, what: str) -> str:
    """Text as it is: a string, null for an empty one, or text parts joined.

    Raises:
        DataError: without file and line; for other types and for a lone surrogate, which no tokenizer can encode.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, f"part {number} of {what}") for number, part in enumerate(value, start=1))
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, not {kind(value)}", mend="write text", snippet=shown(value))
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        mend = "write the whole character; half of it is not text"
        raise DataError(f"lone surrogate in {what}", mend=mend, snippet=snippet(value, exc.start)) from None
    return value


def _message(item: Any, what: str) -> tuple[Message, bool | None]:
    if not isinstance(item, dict):
        mend = 'write {"role": ..., "content": ...}'
        raise DataError(f"{what} must be an object, not {kind(item)}", mend=mend, snippet=shown(item))
    item = {key: value for key, value in item.items() if value is not None or key in ("content", "value")}
    role = _role(item, what)
    what = f"{what} ({role})"
    refuse_media(item, what)
    content = item.get("value") if item.get("content") is None else item["content"]
    if content is not None and item.get("value", content) not in (content, None):
        raise DataError(f"{what} has both a content and a value", mend="keep one of the two")
    calls = _calls(item, what)
    if role == "function_call":
        role, calls, content = "assistant", _tool_calls(content, what), ""
    elif role == "tool" and isinstance(content, dict):
        content = json.dumps(_clean(content, what), ensure_ascii=False)
    thoughts, content = _thoughts(content)
    message: Message = {"role": role, "content": text_of(content, f"the content of {what}")}

    if reasoning := _reasoning(item, thoughts, what):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if key in item:
            message[key] = text_of(item[key], f"{key} of {what}")
    if role != "assistant" and (extra := [key for key in ("reasoning_content", "tool_calls") if key in message]):
        raise DataError(f"{what} has {extra[0]}", mend="only assistant messages can have that")
    if role == "assistant" and not (message["content"].strip() or reasoning or calls):
        raise DataError(f"{what} is empty{_misspelt(item)}", mend="give it text, or leave the row out")
    if role != "assistant" and not item.keys() & {"content", "value"}:
        raise DataError(f"{what} has no content{_misspelt(item)}", mend='write {"role": ..., "content": ...}')
    return message, _train(item, what)


def _role(item: dict[str, Any], what: str) -> str:
    name = item.get("role", item.get("from"))
    if name is None:
        mend = 'write {"role": ..., "content": ...}'
        raise DataError(f"{what} has no role", mend=mend, snippet=shown(item))
    if not isinstance(name, str):
        raise DataError(f"the role of {what} must be a string, not {kind(name)}", snippet=shown(item))
    role = ROLES.get(name.lower())
    if role is None:
        close = nearest(name, ROLES)
        mend = f"did you mean {ROLES[close]}? " if close else ""
        mend += "use system, user, assistant or tool"
        raise DataError(f'unknown role "{snippet(name)}" in {what}', mend=mend)
    return role


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return text_of(part, what)
    if not isinstance(part, dict):
        raise DataError(f"{what} must be an object, not {kind(part)}", mend='write {"type": "text", "text": ...}')
    name = str(part.get("type") or "text")
    if name in _TEXT_PARTS and isinstance(part.get("text"), str):
        return text_of(part["text"], what)
    media = next((_MEDIA[key] for key in _MEDIA if key in name or part.get(f"{key}_url")), None)
    if media:
        raise DataError(f"{media} not supported yet: {what}", mend="leave such rows out", snippet=shown(part))
    mend = 'write {"type": "text", "text": ...}'
    if name.startswith("tool_"):
        mend = "write calls as tool_calls of the message and results as tool messages"
    raise DataError(f"{what} is no text", mend=mend, snippet=shown(part))


def _thoughts(content: Any) -> tuple[str, Any]:
    """Parts of type "thinking" apart from the others."""
    if not isinstance(content, list):
        return "", content
    is_thought = [isinstance(part, dict) and part.get("type") in ("thinking", "reasoning") for part in content]
    thoughts = [part for part, thought in zip(content, is_thought, strict=True) if thought]
    rest = [part for part, thought in zip(content, is_thought, strict=True) if not thought]
    return "".join(text_of(t.get("thinking", t.get("text")), "a thinking part") for t in thoughts), rest


def _reasoning(item: dict[str, Any], thoughts: str, what: str) -> str:
    found = {text_of(item[key], f"{key} of {what}") for key in _REASONING if key in item} | {thoughts}
    found.discard("")
    if len(found) > 1:
        raise DataError(f"{what} has several different reasonings", mend="keep one, as reasoning_content")
    return found.pop() if found else ""


def _train(item: dict[str, Any], what: str) -> bool | None:
    said = set()
    for key in _TRAIN:
        value = item.get(key)
        if value is None:
            continue
        if not (isinstance(value, bool) or (key == "weight" and value in (0, 1))):
            mend = "write 0 or 1" if key == "weight" else "write true or false"
            raise DataError(f"{key} of {what} is {shown(value)}", mend=mend)
        said.add(bool(value))
    if len(said) > 1:
        raise DataError(f"{what} says both to train it and not to", mend=f"keep one of {', '.join(_TRAIN)}")
    return said.pop() if said else None


def _calls(item: dict[str, Any], what: str) -> list[dict[str, Any]]:
    given = [key for key in _CALLS if item.get(key)]
    if len(given) > 1:
        raise DataError(f"{what} has both tool_calls and function_call", mend="keep tool_calls")
    return _tool_calls(item[given[0]], what) if given else []


def _tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """One call or a list of them, with or without the wrapping `function`, or the JSON text of either."""
    if isinstance(value, str):
        value = from_json(value, f"the tool call of {what}")
    calls = []
    for number, call in enumerate(value if isinstance(value, list) else [value], start=1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            mend = 'write {"type": "function", "function": {"name": ..., "arguments": {...}}}'
            raise DataError(f"tool call {number} of {what} names no function", mend=mend, snippet=shown(call))
        known = {"type": "function"}
        if call.get("id") is not None:
            known["id"] = text_of(call["id"], f"the id of tool call {number} of {what}")
        name = text_of(function["name"], f"a function name of {what}")
        arguments = _arguments(function.get("arguments"), f"the arguments of {snippet(name)} in {what}")
        calls.append({**known, "function": {"name": name, "arguments": arguments}})
    return calls


def _arguments(value: Any, what: str) -> dict[str, Any]:
    """Arguments as an object, because templates print what they get: a string would be encoded twice."""
    if isinstance(value, str):
        value = from_json(value, what) if value.strip() else {}  # APIs write "" for none
    if value is None:
        return {}
    if not isinstance(value, dict):
        mend = "write an object of arguments by name, or its JSON text"
        raise DataError(f"{what} must be an object, not {kind(value)}", mend=mend, snippet=shown(value))
    return _clean(value, what)


def _clean(value: dict[str, Any], what: str) -> dict[str, Any]:
    """The value, if a template can print it as JSON."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"lone surrogate in {what}", mend="write the whole character") from None
    except (TypeError, ValueError, RecursionError) as exc:
        raise DataError(f"{what} is not JSON: {snippet(str(exc))}", mend="use text, numbers, lists, objects") from None
    return value


def from_json(text: str, what: str) -> Any:
    """Parse JSON that stands as a string inside a row, as tables and APIs keep it.

    Raises:
        DataError: without file and line.
    """
    try:
        return parse_json(text)
    except DataError as error:
        raise DataError(f"{what}: {error.what}", mend=error.mend, snippet=error.snippet) from None


def _misspelt(item: dict[str, Any]) -> str:
    """A hint at the keys of a message that are not known, one of which may be its text."""
    unknown = [key for key in item if key not in _KNOWN]
    return f" (its keys: {snippet(', '.join(map(str, item)))})" if unknown else ""


def shown(value: Any) -> str:
    """A value of a row as text for a message, without writing out all of a large one."""
    if isinstance(value, str):
        return snippet(f'"{value[:200]}"')
    if isinstance(value, dict):
        return snippet("{" + ", ".join(f'"{key}": {shown(item)}' for key, item in list(value.items())[:5]) + "}")
    if isinstance(value, list):
        return snippet("[" + ", ".join(shown(item) for item in value[:5]) + "]")
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return snippet(repr(value)[:200])
