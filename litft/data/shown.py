"""Rows as people look at them: their lengths as a histogram, their text with what is trained told apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from litft.data.selection import Selection

BINS = 12  # of the histogram
SHOWN_TOKENS = 400  # of an example; more are cut off
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Control characters, those that turn the direction of writing and lone surrogates as escapes.

    Those of a data file must steer neither a terminal nor a page.
    """
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text of a row, cut wherever training begins or ends.

    Args:
        tokenizer: that made the ids.
        ids: of the row, [tokens].
        trained: which of them are in the loss, [tokens].

    Returns:
        Text and whether it is trained; together the whole text.
    """
    found, end, before = [], 0, ""
    for flag, group in itertools.groupby(trained, bool):
        end += len(list(group))
        # Decoded from the start each time: single tokens lose their blanks in some tokenizers. A character that is not
        # whole yet goes with the next piece.
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        text = text if end == len(ids) else text.rstrip("\ufffd")
        found.append((text[len(before) :], flag))
        before = text
    return found


def histogram(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """Counts in ranges of lengths: equally wide ones, but that the last takes all of the longest hundredth.

    Args:
        lengths: tokens of each row, [rows].

    Returns:
        The ranges' edges, one more than ranges, and the rows from each edge up to below the next.
    """
    low, most, high = int(lengths.min()), int(np.percentile(lengths, 99)) + 1, int(lengths.max()) + 1
    width = max(1, -(-(most - low) // (BINS - 1)))
    edges = np.arange(low, most + width, width)
    if edges[-1] < high:
        edges = np.append(edges, high)
    return edges.tolist(), np.histogram(lengths, edges)[0].tolist()


def describe(rows: Selection, tokenizer: PreTrainedTokenizerBase, examples: int = 3) -> dict[str, Any]:
    """What a report shows of the rows that are trained on.

    Args:
        rows: those chosen.
        tokenizer: that encoded them.
        examples: how many are shown as text, the first ones.

    Returns:
        `lengths` (edges, counts, longest, median) and `examples` (row, tokens, trained, pieces, cut).
    """
    edges, counts = histogram(rows.lengths)
    shown = []
    for index in range(min(examples, len(rows))):
        documents = rows.documents(index)  # several in rows of preferences
        for number, (ids, trained) in enumerate(documents, 1):
            some, flags = ids[:SHOWN_TOKENS].tolist(), trained[:SHOWN_TOKENS].tolist()
            shown.append(
                {
                    "row": rows.name(index) + (f", answer {number}" if len(documents) > 1 else ""),
                    "tokens": len(ids),
                    "trained": int(trained.sum()),
                    "pieces": pieces(tokenizer, some, flags),
                    "cut": len(ids) > SHOWN_TOKENS,
                }
            )
    median, longest = int(np.median(rows.lengths)), int(rows.lengths.max())
    return {
        "lengths": {"edges": edges, "counts": counts, "median": median, "longest": longest},
        "examples": shown,
    }
