"""Strict JSON text in, a value or a `DataError` out; and the small helpers that its messages need.

Stricter than `json.loads`, because what it lets pass is silently wrong in training data: NaN and Infinity are not JSON
(RFC 8259, section 6), numbers too large for a float become infinite, and of two equal keys the first one vanishes.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

from litft.errors import DataError

MAX_ROW_BYTES = 256 << 20
"""A longer row is an error of its own, so that a broken file cannot fill the memory."""

_SNIPPET = 80
_BOM = "\ufeff"


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` most like `word`, upper and lower case alike, or None where none is like it."""
    by_lower = {known.lower(): known for known in words}
    close = difflib.get_close_matches(word[:100].lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def snippet(text: str, at: int = 0, size: int = _SNIPPET) -> str:
    """At most `size` printable characters of `text` around `at`; what cannot be seen is shown as a JSON escape."""
    start = max(0, min(at - size // 2, len(text) - size))
    shown = "..." if start else ""
    for position in range(start, len(text)):
        char = text[position]
        # `isprintable` is False for control, zero-width and bidirectional characters and for lone surrogates.
        char = char if char.isprintable() else json.dumps(char)[1:-1]
        rest = 0 if position == len(text) - 1 else len("...")
        if len(shown) + len(char) + rest > size:
            return shown + "..."
        shown += char
    return shown


def kind(value: Any) -> str:
    """What a value is in the words of JSON, for messages ("a string")."""
    if value is None:
        return "null"
    names = {
        bool: "true or false",
        str: "a string",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def parse_json(text: str | bytes, *, file: str | None = None, line: int | None = None, first_line: int = 0) -> Any:
    """Parse one JSON value.

    Args:
        text: the text, or its UTF-8 bytes. A byte order mark in front is dropped.
        file: where it stands, for the error.
        line: the line or row number, for the error.
        first_line: for text that spans lines, the line of the file on which it starts; the error then says the line
            and column in the file, else only the column.

    Raises:
        DataError: with column, snippet and mend: not UTF-8, not JSON, NaN or Infinity, a number out of range, a key
            that stands twice in one object, nesting too deep to read.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise not_utf8(exc, file=file, line=line) from None
    text = text.removeprefix(_BOM)

    def error(what: str, mend: str, at: int = 0) -> DataError:
        return DataError(what, file=file, line=line, mend=mend, snippet=snippet(text, at))

    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as exc:
        where = f"column {exc.colno}"
        if first_line:
            where = f"line {first_line + exc.lineno - 1} of the file, {where}"
        raise error(f"broken JSON at {where}: {_reason(exc)}", _mend(text, exc), exc.pos) from None
    except _NotStrict as exc:
        what, mend, spelling = exc.args
        raise error(what, mend, max(0, text.find(spelling))) from None
    except RecursionError:
        raise error("JSON nested too deeply", "flatten the row") from None
    except ValueError:  # an integer of more digits than Python converts
        raise error("a number has too many digits", "write a shorter number or a string") from None


def not_utf8(exc: UnicodeDecodeError, *, file: str | None = None, line: int | None = None) -> DataError:
    """The error for bytes that are not UTF-8."""
    shown = exc.object[max(0, exc.start - 60) : exc.start + 60].decode("utf-8", "replace")
    what = f"not UTF-8 at byte {exc.start + 1} of the row"
    return DataError(what, file=file, line=line, mend="save the file as UTF-8", snippet=snippet(shown, 40))


class _NotStrict(Exception):
    """what, mend, spelling of the offence."""


def _constant(spelling: str) -> Any:
    raise _NotStrict(f"{spelling} is not JSON", "write null, or quote it", spelling)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _NotStrict("number out of range", "write a smaller number or a string", digits)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _NotStrict(f'key "{snippet(key)}" stands twice in one object', "keep one of the two", json.dumps(key))
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def _reason(exc: json.JSONDecodeError) -> str:
    return (exc.msg[:1].lower() + exc.msg[1:]).removesuffix(" at").removesuffix(" starting")


def _mend(text: str, exc: json.JSONDecodeError) -> str:
    """What to do about a syntax error, judged by the text at its place."""
    before, here = text[max(0, exc.pos - 200) : exc.pos].rstrip(), text[exc.pos : exc.pos + 10]
    if not text.strip() or not here.strip():
        return "the text ends too early: write one whole JSON value"
    if here[0] == "'":
        return "strings take double quotes in JSON"
    if (before.endswith(",") and here[0] in "]}") or "trailing comma" in exc.msg:
        return "remove the last comma"
    if here.startswith(("True", "False", "None")):
        return "write true, false or null"
    if exc.msg.startswith("Unterminated string"):
        return "close the string with a double quote"
    if exc.msg.startswith("Invalid control character"):
        return r"write a line break as \n and a tab as \t"
    if exc.msg.startswith("Invalid \\escape"):
        return r"write a backslash as \\"
    if exc.msg.startswith("Extra data"):
        return "write one JSON value on a line"
    if exc.msg.startswith("Expecting ',' delimiter"):
        return r"a comma is missing, or a quote inside a string is not written \""
    return "write one whole JSON value"


# Strings are matched whole, so brackets and commas inside them are not seen; a quote alone is a string cut off by the
# end of the buffer. Possessive repeats: no backtracking over a long text.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)


def array_elements(handle: IO[bytes], line: int = 1, chunk: int = 1 << 20) -> Iterator[tuple[bytes, int]]:
    """Cut a JSON array into the texts of its elements, holding no more than one of them in memory.

    Only brackets, commas and strings are looked at; each text is for `parse_json` to judge. So one broken element does
    not hide the others, unless its quotes or brackets are unbalanced.

    Args:
        handle: a binary file placed behind the opening bracket.
        line: the line of the file at that place.
        chunk: bytes to read at a time.

    Yields:
        The text of an element and the line of the file on which it starts.

    Raises:
        DataError: the array is not closed, an element exceeds `MAX_ROW_BYTES`, or text follows the array.
    """
    buffer, start, position, depth, elements = b"", 0, 0, 0, 0

    def element(end: int) -> tuple[bytes, int]:
        text = buffer[start:end]
        return text.strip(), line + text[: len(text) - len(text.lstrip())].count(b"\n")

    while True:
        for match in _TOKEN.finditer(buffer, position):
            token = buffer[match.start()]
            if token in b'"' and match.end() == match.start() + 1:
                position = match.start()
                break
            position = match.end()
            if token in b"[{":
                depth += 1
            elif depth and token in b"]}":
                depth -= 1
            elif not depth and token in b",]":
                text, first = element(match.start())
                if token in b"," or text or elements:  # `[]` has no element, `[1,]` has an empty one
                    yield text, first
                    elements += 1
                line += buffer.count(b"\n", start, position)
                start = position
                if token in b"]":
                    buffer += handle.read(chunk)
                    rest, line = element(len(buffer))
                    if rest:
                        what, mend = (
                            f"text after the end of the array (line {line})",
                            "a row before it has a ] too many; or if each line is a row, name the file .jsonl",
                        )
                        raise DataError(what, mend=mend, snippet=snippet(rest.decode("utf-8", "replace")))
                    return
        else:
            position = len(buffer)
        # A string cut off is looked at anew: reading in proportion to it keeps that linear.
        more = handle.read(max(chunk, (len(buffer) - start) // 2))
        if not more:
            text, first = element(len(buffer))
            what = f"the array is not closed; its last element starts on line {first} of the file"
            mend = "the file is cut off, or a bracket or quote is not closed"
            raise DataError(what, mend=mend, snippet=snippet(text[:200].decode("utf-8", "replace")))
        if len(buffer) - start > MAX_ROW_BYTES:
            first = element(start + 200)[1]
            what = f"the element that starts on line {first} of the file is longer than {MAX_ROW_BYTES >> 20} MiB"
            raise DataError(what, mend="a bracket or quote is not closed")
        buffer = buffer[start:] + more
        position, start = position - start, 0
