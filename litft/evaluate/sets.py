"""The sets of rows that a model is evaluated on, read before any model is loaded."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from litft.data import hub, tokens
from litft.data.conversation import Conversation
from litft.data.files import read_rows
from litft.data.rows import to_conversation
from litft.errors import DataError, UserError

BadRows = Literal["error", "skip"]
Asked = dict[int, tuple[Conversation, str]]
"""The question and the reference of each row that is answered, by the row's index."""
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.S)


@dataclass(frozen=True)
class EvalSet:
    """Rows with a name.

    Attributes:
        name: under which their figures stand.
        file: where they came from.
        conversations: the rows.
        skipped: bad rows left out.
        content: hash of the file's bytes.
    """

    name: str
    file: str
    conversations: list[Conversation]
    skipped: int
    content: str


def names_of(sources: list[str]) -> dict[str, str]:
    """Files by name: `NAME=FILE`, or the file's stem.

    Raises:
        UserError: two sets of one name.
    """
    found: dict[str, str] = {}
    for source in sources:
        named = None if Path(source).exists() else _NAMED.fullmatch(source)
        name, file = (named[1], named[2]) if named else (Path(source).name.split(".")[0] or source, source)
        if name in found:
            raise UserError(
                f"--data: two sets are called {name}\nmend: name them, --data ONE={found[name]} OTHER={file}"
            )
        found[name] = file
    return found


def read_set(
    name: str, file: str, *, limit: int | None = None, bad_rows: BadRows = "error", revision: str | None = None
) -> EvalSet:
    """Read a set's rows, of any form that fine-tuning takes.

    Args:
        name: of the set.
        file: a file, a folder of files or a data set id.
        limit: only so many rows, the first.
        bad_rows: a bad row is an error, or left out and counted.
        revision: of a data set on the hub.

    Raises:
        UserError: there is nothing to read, or no good row.
        DataError: a bad row.
    """
    conversations: list[Conversation] = []
    skipped = 0
    for row in itertools.islice(read_rows(file, revision=revision), limit):
        try:
            if row.error is not None:
                raise row.error
            conversations.append(to_conversation(row.value, row.file, row.line))
        except DataError:
            if bad_rows == "error":
                raise
            skipped += 1
    if not conversations:
        raise UserError(f"{file}: no usable row ({skipped} bad); mend: litft data check {file}")
    local = Path(file).expanduser()
    content = tokens.content_hash(str(local)) if local.exists() else hub.content(file, revision=revision)
    return EvalSet(name, file, conversations, skipped, content)


def question_of(conversation: Conversation) -> tuple[Conversation, str] | None:
    """What stands up to the last user turn, and the text that answers it.

    Returns:
        None where there is nothing to compare an answer with: plain text, no user turn, no answer behind it, or one
        that calls a tool.
    """
    messages = conversation.messages
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not turns or turns[-1] + 1 == len(messages):
        return None
    end = turns[-1] + 1
    answer = messages[end]
    if answer["role"] != "assistant" or answer.get("tool_calls") or not answer["content"].strip():
        return None
    question = dataclasses.replace(conversation, messages=messages[:end], train=conversation.train[:end])
    return question, answer["content"]
