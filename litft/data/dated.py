"""Chat templates that write today's date, held to the day a run began on."""

from __future__ import annotations

import json
import re
from datetime import date

_CALL = re.compile(r"""\bstrftime_now\(\s*(['"])(.*?)\1\s*\)""")
_ANY = re.compile(r"\bstrftime_now\(")


def writes_date(template: str | dict[str, str] | None) -> bool:
    """Whether a chat template writes today's date, all of whose forms stand in it."""
    return any(_formats(text) for text in _each(template))


def on_day(template: str, today: date) -> str:
    """The template with its own `strftime_now`, which tells of that day; transformers' tells of the present one.

    Args:
        template: as a tokenizer has it.
        today: the day.
    """
    if not (formats := _formats(template)):
        return template
    words = json.dumps({form: today.strftime(form) for form in formats})
    own = "{% macro strftime_now(format) %}{{ " + words + "[format] }}{% endmacro %}{{ '' }}"
    return own + template  # the empty text: a line break right after a block would be dropped


def _formats(template: str) -> set[str]:
    found = _CALL.findall(template)
    return {form for _, form in found} if len(found) == len(_ANY.findall(template)) else set()


def _each(template: str | dict[str, str] | None) -> list[str]:
    return list(template.values()) if isinstance(template, dict) else [template or ""]
