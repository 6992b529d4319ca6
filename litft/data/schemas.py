"""The forms that a row may have, and how to tell them by their keys."""

from __future__ import annotations

from typing import Any

from litft.data.jsontext import nearest, snippet
from litft.data.messages import is_message

REQUIRED = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The keys that tell a form, in the order in which they are tried."""

METHODS = {"preference": "dpo, orpo, simpo, cpo, reward", "kto": "kto"}
"""Forms that are not for plain fine-tuning, and the methods that they are for."""

FOR = {
    **dict.fromkeys(("messages", "sharegpt", "alpaca", "prompt-completion", "text"), "full, lora, qlora, distill"),
    **METHODS,
}
"""What each form is for."""

_USUAL = {
    "prompt": ("question", "query", "input", "user"),
    "instruction": ("task",),
    "completion": ("answer", "response", "output", "target", "assistant"),
    "output": ("answer", "response", "target"),
    "text": ("content", "document", "body"),
    "messages": ("chat", "dialog", "dialogue", "turns"),
    "conversations": ("conversation",),
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
    chat = keys & {"messages", "conversations"} or keys >= {"prompt", "completion"}
    if chat and is_label(value.get("label")) and not keys >= {"chosen", "rejected"}:
        return "kto"
    return next((name for name, required in REQUIRED.items() if keys.issuperset(required)), "unknown")


def is_label(value: Any) -> bool:
    """True and false only, also as CSV spells them: other labels are somebody's notes."""
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


def nearest_schema(keys: list[str]) -> str:
    """A hint for a row of unknown form: the form nearest to it, and which keys are missing or misspelt."""
    lower = {key.lower(): key for key in keys[:50]}

    def found(wanted: str) -> str | None:
        """The key that stands for a wanted one: itself, another usual name, or a misspelt one."""
        names = [name for name in (wanted, *_USUAL.get(wanted, ())) if name in lower]
        return lower[names[0]] if names else nearest(wanted, lower.values())

    def score(name: str) -> float:
        return sum(1.0 if key in keys else 0.5 if found(key) else 0.0 for key in REQUIRED[name]) / len(REQUIRED[name])

    name = max(REQUIRED, key=score) if any(map(score, REQUIRED)) else "messages"
    pairs = {key: found(key) for key in REQUIRED[name]}
    renamed = [f"{key} -> {wanted}" for wanted, key in pairs.items() if key and key != wanted]
    missing = [wanted for wanted, key in pairs.items() if not key]
    hints = [f"rename {snippet(', '.join(renamed))}"] if renamed else []
    hints += [f"add {', '.join(missing)}"] if missing else []
    return f"nearest is {name} ({', '.join(REQUIRED[name])}): {' and '.join(hints) or 'fill what is null'}"
