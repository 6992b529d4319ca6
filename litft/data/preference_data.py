"""`PreferenceData`: pairs of answers, or labelled ones, planned and packed as chats are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from litft.data.batch import Batch, Document, pack_documents, pad_documents
from litft.data.chat import ChatData
from litft.data.conversation import Conversation
from litft.data.encoding import beginning
from litft.data.files import read_rows
from litft.data.loader import SLOTS, Make, Whole, make_batch
from litft.data.preferences import to_labelled, to_pair
from litft.data.selection import Selection
from litft.errors import UserError

SEARCHED = 64
"""Rows of the step, and then of others, that are looked at for one with another prompt."""


class PreferenceData(ChatData):
    """Rows of `litft.data.preferences`. The two documents of a pair stay together, whatever is packed with them.

    A limit on length holds for each document of a pair, prompt included; a row whose answer would be cut away is left
    out, both of a pair.

    Args:
        train: as for `ChatData`, like all others.
        options: of `ChatData`; `train_on` is none of them, since what is trained is the answer.
    """

    kinds: ClassVar[tuple[str, ...]] = ("pairs", "labelled")
    prompts_too = False

    def prepare(self, method: Any, **limits: Any) -> PreferenceData:
        """As of `ChatData`."""
        self.prompts_too = method.prompts_too
        super().prepare(method, **limits)
        return self

    def __init__(self, train: str | list[str], **options: Any) -> None:
        super().__init__(train, **options)
        if self.train_on != "assistant":
            raise UserError("--data.train_on: of preference rows the answers are trained; leave it out")

    def maker(self, rows: Selection) -> Make:
        """What makes a micro-batch; beside the documents it has the numbers that the rows bring."""
        make = partial(_make, rows, self._planned().packing, self._pad_id, self.prompts_too)
        return partial(_with_mismatched, make, rows, self._pad_id) if self.kind == "labelled" else make

    def held_out_prompts(self, count: int) -> list[Conversation]:
        """The beginnings, up to the answer, of some rows of the first validation set."""
        rows = next(iter(self.val_selections.values()), None)
        if rows is None or not count or not len(rows):
            return []
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
        found = []
        for index, store in enumerate(rows.stores):
            at = rows.row_of_file[chosen[rows.file_of_row[chosen] == index]]
            lines = set(store.lines[at].tolist())
            for row in read_rows(store.file, revision=self.revision) if lines else ():
                if row.line in lines and row.error is None:
                    found.append(beginning(_CONVERSATIONS[self.kind](row.value)))
        return found[:count]


_CONVERSATIONS: dict[str, Callable[[Any], Conversation]] = {
    "pairs": lambda value: to_pair(value).chosen,
    "labelled": lambda value: to_labelled(value).conversation,
}


def _make(rows: Selection, packing: bool, pad_id: int, prompts_too: bool, some: np.ndarray, whole: Whole) -> Batch:
    """A micro-batch, and with it the numbers that its rows bring, what is known of them, and a count of the step's."""
    batch = make_batch(some, rows.whole_documents if prompts_too else rows.documents, whole, packing, pad_id)
    batch["values"] = torch.tensor([rows.value(int(row)) for row in some], dtype=torch.float32)
    counts = (rows.lengths_of if prompts_too else rows.trained_of)[whole.rows, 0]
    chosen = (counts - prompts_too).sum()  # nothing predicts a document's first token
    batch["chosen_denominator"] = torch.tensor(chosen / whole.ranks, dtype=torch.float32)
    if prompts_too:
        masks = [trained[1:] for row in some for _, trained in rows.documents(int(row))]
        batch["answers"] = torch.from_numpy(np.concatenate(masks or [np.zeros(0, bool)]))
    return batch | {name: torch.from_numpy(attached.of(some)) for name, attached in rows.attached.items()}


def _with_mismatched(make: Make, rows: Selection, pad_id: int, some: np.ndarray, whole: Whole) -> Batch:
    """A micro-batch, and under `mismatched` one of the same prompts with the answers of other rows.

    Of the rows of a step (or of a validation set), in the order of the file, each prompt gets the answer of the nearest
    row before it that has another prompt, whatever micro-batch or rank that is in; where a step has no other prompt,
    that of another step's row.
    """
    batch = make(some, whole)
    documents = []
    for row in map(int, some):
        asked = rows.read(row)
        others = partial(before, row, whole.ordered, len(rows))
        fitting = (other for other in others() if _prompt(rows.read(other)) != _prompt(asked))
        answered = rows.read(next(fitting, next(others(), row)))  # the nearest one where there is but one prompt
        documents.append(mismatched(asked, answered, rows.max_length))
    if not documents:
        documents = [(np.zeros(8, np.int64), np.zeros(8, bool))]
    packing = "attention_mask" not in batch
    made = pack_documents(documents, 1.0, SLOTS, pad_id) if packing else pad_documents(documents, 1.0, pad_id)
    return batch | {"mismatched": made | {"rows": len(some)}}


def before(row: int, ordered: np.ndarray, count: int) -> Iterator[int]:
    """The rows whose answers a row's prompt may get, in the order in which they are asked.

    Args:
        row: of a step.
        ordered: the step's rows, each once.
        count: of all rows.

    Yields:
        The nearest other rows of the step, backwards and round; then the nearest of all rows.
    """
    at = int(np.searchsorted(ordered, row))
    yield from (int(ordered[at - i]) for i in range(1, min(len(ordered), SEARCHED)))
    yield from ((row - i) % count for i in range(1, min(count, SEARCHED)))


def _prompt(document: Document) -> bytes:
    ids, trained = document
    return np.ascontiguousarray(ids[: int(trained.argmax())]).tobytes()


def mismatched(asked: Document, answered: Document, max_length: int) -> Document:
    """The prompt of one document and the answer of another, cut at `max_length`."""
    (ids, trained), (others, answer) = asked, answered
    begin, first = int(trained.argmax()), int(answer.argmax())
    mask = np.concatenate([np.zeros(begin, bool), answer[first:]])
    return np.concatenate([ids[:begin], others[first:]])[:max_length], mask[:max_length]
