"""What a chat template itself marks as the model's: the parts between {% generation %} and {% endgeneration %}.

transformers counts these parts while it renders, in a time that grows with the square of their number. Here they are
rendered with marks around them, by a macro that takes the place of the tag: blocks of the same kind, so that names and
blanks come out alike.
"""

from __future__ import annotations

import re

from litft.data.masks import MARK_CLOSE, MARK_OPEN, MaskError, Span

_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_MACRO = f"{{% macro litft_generation() %}}{MARK_OPEN}{{{{ caller() }}}}{MARK_CLOSE}{{% endmacro +%}}"
_SPLIT = re.compile(f"({MARK_OPEN}|{MARK_CLOSE})")


def marking(template: str) -> str:
    """The template that writes marks around what `template` marks; empty where it marks nothing."""

    def tag(found: re.Match) -> str:
        return f"{found[1]}{'endcall' if found[2] else 'call litft_generation()'}{found[3]}"

    marked, count = _TAG.subn(tag, template)
    return _MACRO + marked if count else ""


def marked_spans(render: str, text: str) -> list[Span]:
    """The character ranges of `text` that are marked.

    Args:
        render: what the marking template writes.
        text: what the template itself writes.

    Raises:
        MaskError: the two differ in more than the marks.
    """
    spans, pieces, position, depth, begin = [], [], 0, 0, 0
    for piece in _SPLIT.split(render):
        if piece == MARK_OPEN:
            begin = begin if depth else position
            depth += 1
        elif piece == MARK_CLOSE:
            depth -= 1
            if not depth and begin < position:
                spans.append((begin, position))
        else:
            pieces.append(piece)
            position += len(piece)
    if "".join(pieces) != text:
        raise MaskError("the parts that the chat template marks with {% generation %} can't be found in its text")
    return spans
