"""Which of the encoded rows are used: the length limit, what it leaves to train on, and the held-out part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from litft.data.batch import Document
from litft.data.tokens import TokenStore
from litft.errors import DataError, UserError

MAX_HELD_OUT = 200  # rows; more cost time at every validation and tell little more
MIN_ROWS_TO_SPLIT = 20
BAD_ROWS = "bad rows skipped"


@dataclass
class Attached:
    """Numbers that belong to rows, or to parts of them.

    Attributes:
        values: of all rows end to end, [any, ...].
        offsets: where each row's begin and the last's end, int64 [rows + 1].
    """

    values: np.ndarray
    offsets: np.ndarray

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Those of some rows, in their order."""
        parts = [self.values[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        return np.concatenate(parts) if parts else self.values[:0]


@dataclass
class Selection:
    """Rows of one or more stores.

    Attributes:
        stores: where the rows lie.
        file_of_row: index into `stores`, [rows].
        row_of_file: index within its store, [rows].
        lengths_of: tokens of each document of each row, after cutting, [rows, documents].
        trained_of: trained tokens of each, after cutting.
        max_length: where documents are cut.
        cut: which rows were, bool [rows].
        dropped: how many rows of the files were left out, by reason.
    """

    stores: list[TokenStore]
    file_of_row: np.ndarray
    row_of_file: np.ndarray
    lengths_of: np.ndarray
    trained_of: np.ndarray
    max_length: int
    cut: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)
    attached: dict[str, Attached] = field(default_factory=dict)
    """What was computed of the rows ahead, and goes into their micro-batches under these names."""

    def __len__(self) -> int:
        return len(self.file_of_row)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, of all its documents together."""
        return self.lengths_of.sum(1)

    @cached_property
    def trained(self) -> np.ndarray:
        """Trained tokens of each row."""
        return self.trained_of.sum(1)

    @property
    def truncated(self) -> int:
        """How many rows were cut."""
        return int(self.cut.sum())

    def documents(self, row: int) -> list[Document]:
        """Ids and mask of each document of a row."""
        store, index = self.stores[self.file_of_row[row]], int(self.row_of_file[row])
        first = index * store.documents
        return [store.document(i, self.max_length) for i in range(first, first + store.documents)]

    def read(self, row: int) -> Document:
        """Ids and mask of a row's first document."""
        return self.documents(row)[0]

    def whole_documents(self, row: int) -> list[Document]:
        """The documents of a row, all of their tokens trained."""
        return [(ids, np.ones_like(trained)) for ids, trained in self.documents(row)]

    def value(self, row: int) -> float:
        """The number that a row brings."""
        return float(self.stores[self.file_of_row[row]].values[self.row_of_file[row]])

    def name(self, row: int) -> str:
        """`file:line` of a row."""
        store = self.stores[self.file_of_row[row]]
        return f"{store.file}:{store.lines[self.row_of_file[row]]}"

    def prompts(self) -> np.ndarray:
        """Hash of each row's prompt."""
        out = np.empty(len(self), np.uint64)
        for index, store in enumerate(self.stores):
            mine = self.file_of_row == index
            out[mine] = store.prompts[self.row_of_file[mine]]
        return out

    def take(self, keep: np.ndarray) -> Selection:
        """The rows where `keep` (bool or indices); what was left out before is not counted again."""
        return Selection(
            self.stores,
            self.file_of_row[keep],
            self.row_of_file[keep],
            self.lengths_of[keep],
            self.trained_of[keep],
            self.max_length,
            self.cut[keep],
        )


def select(
    stores: list[TokenStore], max_length: int, overlong: Literal["drop", "truncate", "error"], name: str
) -> Selection:
    """The rows that fit and have something to train on, and the count of the others.

    Args:
        stores: the encoded files.
        max_length: longest document in tokens.
        overlong: what happens to rows with longer ones.
        name: of the set, for messages.

    Raises:
        DataError: for an overlong row where those are errors.
        UserError: where no row is left.
    """
    each = stores[0].documents
    whole = np.concatenate([store.lengths for store in stores]).reshape(-1, each)
    file_of_row = np.repeat(np.arange(len(stores)), [len(store) for store in stores])
    row_of_file = np.concatenate([np.arange(len(store)) for store in stores])
    over = np.asarray((whole > max_length).any(1))
    if overlong == "error" and over.any():
        first = int(over.argmax())
        store = stores[file_of_row[first]]
        raise DataError(
            f"{int(whole[first].max())} tokens, over the limit of {max_length}",
            file=store.file,
            line=int(store.lines[row_of_file[first]]),
            mend="raise --data.max_length, or set --data.overlong drop or truncate",
        )
    lengths = np.minimum(whole, max_length)
    trained = np.concatenate([store.trained_counts(max_length) for store in stores]).reshape(-1, each)
    dropped: Counter[str] = Counter()
    keep = np.ones(len(whole), bool)
    if overlong == "drop":
        keep &= ~over
        dropped[f"longer than {max_length} tokens"] = int(over.sum())
    nothing = keep & (trained == 0).any(1)
    dropped["nothing to train on within the limit"] = int(nothing.sum())
    keep &= ~nothing
    dropped[BAD_ROWS] = sum(store.bad for store in stores)
    everything = Selection(stores, file_of_row, row_of_file, lengths, trained, max_length, over)
    chosen = everything.take(keep)
    chosen.dropped = {reason: count for reason, count in dropped.items() if count}
    if not len(chosen):
        reasons = ", ".join(f"{count} {reason}" for reason, count in chosen.dropped.items())
        files = ", ".join(store.file for store in stores)
        raise UserError(
            f"{files}: no {name} row is left: {reasons}; mend: raise --data.max_length or --data.overlong truncate"
        )
    return chosen


def split_validation(rows: Selection, fraction: float) -> tuple[Selection, Selection]:
    """Hold out a share of the rows by their prompts' hashes, so that the same prompt is never on both sides.

    A pure function of the rows' content: the same on every rank, in every run and after a resume.

    Args:
        rows: all rows.
        fraction: share to hold out; at most `MAX_HELD_OUT` rows, none where there are fewer than `MIN_ROWS_TO_SPLIT`.

    Returns:
        The rows to train on, which go on counting what the files' rows lost before, and those held out.
    """
    wanted = min(MAX_HELD_OUT, round(len(rows) * fraction))
    if len(rows) < MIN_ROWS_TO_SPLIT or not wanted:
        return rows, rows.take(np.zeros(len(rows), bool))
    prompts = rows.prompts()
    unique, counts = np.unique(prompts, return_counts=True)
    mixed = (unique * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(
        1
    )  # spreads the hashes; the order is then arbitrary but fixed
    order = np.argsort(mixed, kind="stable")
    held: list[int] = []
    total = 0
    for index in order:
        if total >= wanted:
            break
        if total + counts[index] <= wanted:
            held.append(index)
            total += int(counts[index])
    out = np.isin(prompts, unique[held])
    if out.all() or not out.any():
        return rows, rows.take(np.zeros(len(rows), bool))
    kept = rows.take(~out)
    kept.dropped = rows.dropped
    return kept, rows.take(out)
