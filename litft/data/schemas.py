"""The forms that a row may have, and how to tell them by their keys."""

from __future__ import annotations

from typing import Any

from litft.data.jsontext import nearest
from litft.data.messages import is_message

REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
}
"""The keys that tell a form, in the order in which they are tried (preference and kto come before all)."""

METHODS = {"preference": "dpo", "kto": "kto"}
"""Forms that are not for plain fine-tuning, and a method that they are for."""

_USUAL = {
    "question": "prompt",
    "query": "prompt",
    "input": "prompt",
    "answer": "completion",
    "response": "completion",
    "target": "completion",
    "context": "text",
    "document": "text",
    "chat": "messages",
    "dialog": "messages",
    "dialogue": "messages",
    "conversation": "conversations",
}
"""What other data sets call the same thing: for hints only, nothing is read by these names."""


def schema_of(value: Any) -> str:
    """The form of a row, by its keys; where several fit, the one that says most.

    Returns:
        "messages" (also for a bare list of messages), "sharegpt", "alpaca", "prompt-completion", "text", "preference"
        or "kto"; "unknown" for anything else.
    """
    if isinstance(value, list):
        first = value[0] if value else {"role": ""}
        return ("sharegpt" if "role" not in first else "messages") if is_message(first) else "unknown"
    if not isinstance(value, dict):
        return "unknown"
    keys = {key for key, item in value.items() if item is not None}
    if keys >= {"chosen", "rejected"}:
        return "preference"
    chat = keys & {"messages", "conversations"} or keys >= {"prompt", "completion"}
    if chat and _is_label(value.get("label")):
        return "kto"
    return next((name for name, required in REQUIRED.items() if keys.issuperset(required)), "unknown")


def _is_label(value: Any) -> bool:
    """True and false only, also as CSV spells them: other labels are somebody's notes."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def nearest_schema(keys: list[str]) -> str:
    """A hint for a row of unknown form: the form nearest to it, and which keys are missing or misspelt."""
    meant = {key: _USUAL.get(key.lower()) or nearest(key, sum(REQUIRED.values(), ())) for key in keys[:50]}
    found = set(meant.values())
    name = max(REQUIRED, key=lambda name: len(found & set(REQUIRED[name])) / len(REQUIRED[name]))
    required = REQUIRED[name]
    renamed = [f"{key} -> {meant[key]}" for key in meant if meant[key] in required and key != meant[key]]
    missing = [key for key in required if key not in found]
    hints = [f"rename {', '.join(renamed)}"] if renamed else []
    hints += [f"add {', '.join(missing)}"] if missing else []
    return f"nearest is {name} ({', '.join(required)}): {' and '.join(hints) or 'fill what is null'}"
