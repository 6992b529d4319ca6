"""Conversations to answer: what rows say up to their first answer."""

from __future__ import annotations

import numpy as np

from litft.data.conversation import Conversation
from litft.data.files import read_rows
from litft.data.rows import schema_of, to_conversation
from litft.data.selection import Selection


def beginnings(rows: Selection, count: int, revision: str | None = None) -> list[Conversation]:
    """The beginnings, up to the first answer, of some rows spread evenly over a selection.

    Args:
        rows: of chats; rows of plain text have no beginning.
        count: how many.
        revision: of data sets on the hub.
    """
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    found: list[Conversation] = []
    for index, store in enumerate(rows.stores):
        wanted = set(rows.row_of_file[chosen[rows.file_of_row[chosen] == index]].tolist())
        at = 0  # of the store, which lacks the bad rows
        for row in read_rows(store.file, revision=revision) if wanted else ():
            if at == len(store) or at > max(wanted):
                break
            if row.line != store.lines[at]:
                continue
            if at in wanted and schema_of(row.value) != "text":
                chat = to_conversation(row.value, row.file, row.line)
                end = next(i for i, m in enumerate(chat.messages) if m["role"] == "assistant")
                if end:
                    found.append(Conversation(chat.messages[:end], chat.train[:end], chat.tools))
            at += 1
    return found
