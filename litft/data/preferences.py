"""Rows for preference methods: two answers to the same prompt, or one answer and whether it is a good one.

| form | keys |
|---|---|
| preference | `chosen`, `rejected`: strings, messages, or whole conversations, whose common beginning is the prompt |
| | before them `prompt` (a string or messages), `messages`, `conversations` or `instruction` (and `input`) |
| kto | `label` (true or false) beside `messages`, `conversations`, or `prompt` and `completion` |

Beside them `system` and `tools`, as in chat rows. A pair may bring a `margin`, or two scores (`score_chosen`,
`score_rejected`, or the other way round) whose difference it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from litft.data.conversation import Conversation, Message
from litft.data.messages import is_message, refuse_media, shown, text_of, to_messages, to_tools
from litft.data.rows import convert_chat, located
from litft.data.schemas import FOR, is_label, schema_of
from litft.errors import DataError

PROMPTS = ("prompt", "messages", "conversations", "instruction")
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


@dataclass
class Pair:
    """Two answers to the same prompt; only what follows the prompt is trained.

    Attributes:
        chosen: the better one, with its prompt.
        rejected: the other, with the same prompt.
        margin: by how much it is better, where the row says so.
    """

    chosen: Conversation
    rejected: Conversation
    margin: float = 0.0


@dataclass
class Labelled:
    """An answer, and whether it is a good one; only the answer is trained."""

    conversation: Conversation
    label: bool


def to_pair(value: Any, file: str | None = None, line: int | None = None) -> Pair:
    """Bring a row with `chosen` and `rejected` into the canonical form.

    Args:
        value: the row as JSON has it.
        file: where it stands, for errors.
        line: its line or number there.

    Raises:
        DataError: what is wrong with it and how to mend it, or that it is for another method.
    """
    pair: Pair = located(_pair, value, file, line)
    for conversation in (pair.chosen, pair.rejected):
        conversation.file, conversation.line = file or "", line or 0
    return pair


def to_labelled(value: Any, file: str | None = None, line: int | None = None) -> Labelled:
    """Bring a row with a `label` into the canonical form; arguments and errors as `to_pair`."""
    labelled: Labelled = located(_labelled, value, file, line)
    labelled.conversation.file, labelled.conversation.line = file or "", line or 0
    return labelled


def _pair(row: Any) -> Pair:
    _check_form(row, "preference", "chosen, rejected")
    refuse_media(row, "the row")
    prompt = _prompt(row)
    chosen, rejected = (_answer(row, key) for key in ("chosen", "rejected"))
    if _begins_with_question(chosen) and _begins_with_question(rejected):
        if not _holds(chosen, prompt):
            mend = "leave the prompt out, or begin chosen and rejected with it"
            raise DataError("chosen is a whole conversation, and the prompt is no part of it", mend=mend)
        prompt = []
    chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
    shared = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if shared == len(chosen) == len(rejected):
        raise DataError("chosen and rejected are the same", mend="leave the row out")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) == shared:
            raise DataError(f"{name} is the beginning of the other", mend="give both an answer of their own")
        if messages[shared]["role"] != "assistant":
            mend = "the two may differ from an answer on, not before"
            raise DataError(f"{name} answers another prompt (message {shared + 1} differs)", mend=mend)
    if not shared:
        raise DataError("no prompt: chosen and rejected begin with an answer", mend="add a prompt")
    return Pair(_conversation(row, chosen, shared), _conversation(row, rejected, shared), _margin(row))


def _labelled(row: Any) -> Labelled:
    _check_form(row, "kto", "label")
    label = row["label"] if isinstance(row["label"], bool) else row["label"].lower() == "true"
    conversation = convert_chat({key: value for key, value in row.items() if key != "label"})
    last = len(conversation.messages) - 1
    if conversation.messages[last]["role"] != "assistant":
        raise DataError("the last message is no answer", mend="a label says of an answer whether it is good")
    if "completion" not in row or row["completion"] is None:  # its own messages are trained, the prompt's not
        roles = [message["role"] for message in conversation.messages]
        conversation.train = [i == last if role == "assistant" else None for i, role in enumerate(roles)]
    return Labelled(conversation, label)


def _check_form(row: Any, wanted: str, keys: str) -> None:
    schema = schema_of(row)
    if schema == wanted:
        return
    label = row.get("label") if wanted == "kto" and isinstance(row, dict) else None
    if label is not None and not is_label(label):
        raise DataError(f"label must be true or false, not {shown(label)}", mend="write true or false")
    if schema == "unknown":
        present = list(row) if isinstance(row, dict) else []
        missing = ", ".join(key for key in keys.split(", ") if key not in present) or keys
        raise DataError(f"not a {wanted} row (for {FOR[wanted]}): it lacks {missing}", mend=f"add {missing}")
    raise DataError(
        f"{schema} row (for {FOR[schema]}), not for {FOR[wanted]}: it lacks {keys}",
        mend=f"add {keys}, or use another method",
    )


def _prompt(row: dict[str, Any]) -> list[Message]:
    given = [key for key in PROMPTS if row.get(key)]
    if len(given) > 1 and "instruction" not in given:
        raise DataError(f"two prompts: {' and '.join(given)}", mend="keep one of them")
    if not given:
        return []
    value = row[given[0]]
    if given[0] == "instruction" or (given[0] == "prompt" and isinstance(value, str)):
        text = text_of(value, given[0])
        if given[0] == "instruction" and (more := text_of(row.get("input"), "input")):
            text = f"{text}\n{more}"
        return [{"role": "user", "content": text}]
    messages, _ = to_messages([value] if is_message(value) else value, "prompt message")
    return messages


def _answer(row: dict[str, Any], key: str) -> list[Message]:
    value = row[key]
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    messages, _ = to_messages([value] if is_message(value) else value, f"{key} message")
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{key} does not end with an answer", mend="add the assistant's message")
    return messages


def _begins_with_question(messages: list[Message]) -> bool:
    return messages[0]["role"] in ("system", "user")


def _holds(messages: list[Message], prompt: list[Message]) -> bool:
    """Whether the prompt that stands beside a whole conversation is a part of it."""
    texts = [message["content"].strip() for message in messages]
    return all(message["content"].strip() in texts for message in prompt)


def _conversation(row: dict[str, Any], messages: list[Message], shared: int) -> Conversation:
    roles = [message["role"] for message in messages]
    flags: list[bool | None] = [False if i < shared and r == "assistant" else None for i, r in enumerate(roles)]
    if system := text_of(row.get("system"), "system"):
        if messages[0]["role"] == "system" and messages[0]["content"] != system:
            raise DataError("two system prompts: the key system and a system message", mend="keep one of them")
        if messages[0]["role"] != "system":
            messages, flags = [{"role": "system", "content": system}, *messages], [None, *flags]
    return Conversation(messages, flags, tools=to_tools(row.get("tools")))


def _margin(row: dict[str, Any]) -> float:
    if row.get("margin") is not None:
        return _number(row, "margin")
    for better, worse in SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            return _number(row, better) - _number(row, worse)
    return 0.0


def _number(row: dict[str, Any], key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{key} must be a number, not {shown(value)}", mend="write a number, or leave it out")
    return float(value)
