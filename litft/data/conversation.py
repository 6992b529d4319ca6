"""The one canonical form of a training row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""`role` (system, user, assistant, tool), `content` (a string, never None) and, where present, `reasoning_content`
(str), `tool_calls` (`[{"type": "function", "id"?, "function": {"name": str, "arguments": dict}}]`), `tool_call_id`,
`name`: the form that chat templates take."""


@dataclass(slots=True)
class Conversation:
    """A chat row, or a raw text row.

    Attributes:
        messages: the turns in order; empty for a raw text row.
        train: for each message, False where the row says `train: false`, True where it says `train: true`,
            None where it says nothing (then `data.train_on` decides).
        tools: JSON schemas of the functions on offer, as chat templates take them.
        text: the text of a raw text row (`{"text": ...}`), of which every token is trained.
        file: where the row came from, for messages.
        line: its 1-based line or row number there.
    """

    messages: list[Message] = field(default_factory=list)
    train: list[bool | None] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    file: str = ""
    line: int = 0
