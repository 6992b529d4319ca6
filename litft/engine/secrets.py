"""Tokens and passwords, kept out of what a run writes and says."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "<hidden>"
"""What stands in place of a secret."""
SHORTEST = 8
"""Characters of a value in the environment that is looked for; a shorter one would be found where it isn't meant."""

_VARIABLE = re.compile(r"(?:^|_)(?:token|secret|passw(?:or)?d|passphrase|credential)s?(?:_|$)", re.IGNORECASE)
_MAYBE = re.compile(r"(?:^|_)(?:api)?keys?(?:_|$)", re.IGNORECASE)
"""Of a variable that may hold a key of another kind, such as the one to sort by: then its value tells."""
_NAME = (
    r"(?:\w*_)?(?:(?:api|access|secret|private|auth)_?key|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:api|auth|access|hub|hf|bearer)_?token)|token"
)
_KEY = re.compile(_NAME, re.IGNORECASE)
_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'[^']*'"
_ASSIGNED = re.compile(rf"(?<!\w)({_NAME})([\"']?\s*[:=]\s*)({_QUOTED}|[^\s,;&\"'}}\]]+)", re.IGNORECASE)
_ISSUED = re.compile(r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|gh[opsu]_[A-Za-z0-9]{30,}|glpat-[\w-]{20,})")
_LOGIN = re.compile(r"(?<=://)(?!git@)[^/\s\"']+(?=@)")


def hide(value: Any) -> Any:
    """A copy without secrets; what holds none comes back equal.

    Hidden are the values of environment variables whose names say token, key, secret, password or credential; what has
    the form of a token of the model hub, GitHub or GitLab; user and password in an address; and what is given to a key
    such as `api_key`, in a mapping, a text or after a flag.

    Args:
        value: text, or lists and mappings of it; anything else is left as it is.
    """
    return _hide(value, _in_environment())


def issued(text: str) -> bool:
    """Whether a text holds a token by its form, or the value of an environment variable that is a secret."""
    return _ISSUED.search(text) is not None or any(secret in text for secret in _in_environment())


def hide_yaml(text: str) -> str:
    """YAML without secrets; the same text, byte for byte, where it holds none."""
    import yaml

    content = yaml.safe_load(text)
    hidden = hide(content)
    return text if hidden == content else yaml.safe_dump(hidden, sort_keys=False)


def _hide(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _hide_text(value, known)
    if isinstance(value, dict):
        return {key: HIDDEN if _is_secret(str(key), item) else _hide(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        before = ["", *value][: len(value)]  # a command line gives a flag its value in the next word
        pairs = zip(before, value, strict=True)
        return type(value)(HIDDEN if _follows_flag(flag, item) else _hide(item, known) for flag, item in pairs)
    return value


def _hide_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    return _ASSIGNED.sub(_without_value, _LOGIN.sub(HIDDEN, _ISSUED.sub(HIDDEN, text)))


def _without_value(found: re.Match[str]) -> str:
    key, sign, value = found.groups()
    quote = value[0] if value[0] in "\"'" else ""
    return f"{key}{sign}{quote}{HIDDEN}{quote}" if _is_secret(key, value.strip(quote)) else found[0]


def _is_secret(key: str, value: Any) -> bool:
    """Whether a key's value is to be hidden: the last part of a dotted key decides; null and true are no secrets."""
    nothing = value in (None, "") or str(value).lower() in ("null", "none", "true", "false")
    return not nothing and _KEY.fullmatch(key.rpartition(".")[2]) is not None


def _follows_flag(flag: Any, value: Any) -> bool:
    return isinstance(flag, str) and flag.startswith("--") and _is_secret(flag[2:], value)


def _in_environment() -> list[str]:
    """The secrets among the values of environment variables, longest first; the path of a file is none."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and (_VARIABLE.search(name) or (_MAYBE.search(name) and re.search(r"\d", value)))
    }
    return sorted((value for value in values if not os.path.exists(value)), key=len, reverse=True)
