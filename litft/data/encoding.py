"""A row of any form to its documents: tokens and masks, what precedes the answer, and the number that it brings."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from litft.data.conversation import Conversation
from litft.data.preferences import to_labelled, to_pair
from litft.data.rows import schema_of, to_conversation

if TYPE_CHECKING:
    from litft.data.files import Row
    from litft.data.template import ChatEncoder, Encoded


def encode_chat(encoder: ChatEncoder, row: Row) -> tuple[str, Encoded, str]:
    """The schema's name of a chat or a text, its document, and what precedes the first answer.

    Raises:
        DataError: the row is bad.
    """
    if row.error is not None:
        raise row.error
    conversation = to_conversation(row.value, row.file, row.line)
    return schema_of(row.value), encoder(conversation), prompt_of(conversation)


def encode_pair(encoder: ChatEncoder, row: Row) -> tuple[str, list[Encoded], str, float]:
    """Of a row with `chosen` and `rejected`: its two documents, and as its number the margin.

    Raises:
        DataError: the row is bad.
    """
    if row.error is not None:
        raise row.error
    pair = to_pair(row.value, row.file, row.line)
    documents = [encoder(pair.chosen), encoder(pair.rejected)]
    return schema_of(row.value), documents, prompt_of(beginning(pair.chosen)), pair.margin


def encode_labelled(encoder: ChatEncoder, row: Row) -> tuple[str, Encoded, str, float]:
    """Of a row with a `label`: its document, and as its number the label, 1 or 0.

    Raises:
        DataError: the row is bad.
    """
    if row.error is not None:
        raise row.error
    labelled = to_labelled(row.value, row.file, row.line)
    prompt = prompt_of(beginning(labelled.conversation))
    return schema_of(row.value), encoder(labelled.conversation), prompt, float(labelled.label)


ENCODERS: dict[str, Callable[[ChatEncoder, Row], tuple[Any, ...]]] = {
    "chats": encode_chat,
    "pairs": encode_pair,
    "labelled": encode_labelled,
}
"""By what a method is trained on."""


def encode_any(encoder: ChatEncoder, row: Row) -> tuple[Any, ...]:
    """A row of whatever form.

    Raises:
        DataError: the row is bad.
    """
    kinds = {"preference": "pairs", "kto": "labelled"}
    return ENCODERS[kinds.get(schema_of(row.value), "chats")](encoder, row)


def beginning(conversation: Conversation) -> Conversation:
    """What precedes the first answer that is trained."""
    messages, flags = conversation.messages, conversation.train
    end = next(i for i, m in enumerate(messages) if m["role"] == "assistant" and flags[i] is not False)
    return Conversation(messages[:end], flags[:end], conversation.tools)


def prompt_of(conversation: Conversation) -> str:
    """What precedes the first answer, whatever is trained: rows that share it stay on one side of the split."""
    if conversation.text is not None:
        return conversation.text
    messages = conversation.messages
    end = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
    return json.dumps([messages[:end] or messages, conversation.tools], sort_keys=True)
