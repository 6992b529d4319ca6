"""Rows to conversations, and the check of a whole source.

| form | keys |
|---|---|
| messages | `messages` (role, content), or a bare list of messages |
| sharegpt | `conversations` (from, value) |
| alpaca | `instruction`, `output`; `input` follows the instruction on a line of its own; `system`, `history` (pairs) |
| prompt-completion | `prompt`, `completion`: strings, or lists of messages, of which the prompt's are not trained |
| text | `text`: every token is trained |

All but text may have `system` and `tools`. Other keys are ignored, unless they hold images, audio or video. Lists may
stand as their JSON text, as tables keep them. In messages:

* roles go by their usual other names too, in upper or lower case: human, gpt, model, developer (system), function and
  observation (tool), function_call (an assistant message whose text is the call);
* content is a string, null (empty) or a list of text parts (joined); that of a tool may be an object (its JSON);
* `reasoning_content`, `thinking` and `reasoning` are one thing, so are `train`, `trainable` and `weight` (0 or 1);
* the arguments of a tool call become an object; none, null and "" an empty one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from litft.data.conversation import Conversation, Message
from litft.data.files import Progress, Row, read_rows
from litft.data.jsontext import kind, snippet
from litft.data.messages import from_json, is_message, refuse_media, shown, text_of, to_messages, to_tools
from litft.data.schemas import METHODS, nearest_schema, schema_of
from litft.errors import DataError

__all__ = ["Check", "check", "conversations", "schema_of", "to_conversation"]


def to_conversation(value: Any, file: str | None = None, line: int | None = None) -> Conversation:
    """Bring a row of any form into the canonical one.

    Text is kept to the character. An assistant message needs text, reasoning or a tool call; users, tools and the
    system may say nothing. Any order of roles is let through: the chat template decides.

    Args:
        value: the row as JSON has it.
        file: where it stands, for errors and for `Conversation.file`.
        line: its line or number there.

    Raises:
        DataError: what is wrong with it and how to mend it, or that it is for another method.
    """
    conversation: Conversation = located(convert_chat, value, file, line)
    conversation.file, conversation.line = file or "", line or 0
    return conversation


def located(convert: Callable[[Any], Any], value: Any, file: str | None, line: int | None) -> Any:
    """What `convert` makes of a row, its errors with file and line."""
    try:
        return convert(value)
    except DataError as error:
        raise DataError(error.what, file=file, line=line, mend=error.mend, snippet=error.snippet) from None
    except RecursionError:
        raise DataError("nested too deeply", file=file, line=line, mend="flatten the row") from None


def convert_chat(value: Any) -> Conversation:
    """A row of a chat, or of text, without file and line.

    Raises:
        DataError: what is wrong with it.
    """
    schema = schema_of(value)
    if schema in METHODS:
        mend = f"fine-tune with {METHODS[schema].partition(',')[0]}, or give a file of messages"
        raise DataError(f"{schema} row (for {METHODS[schema]}), not for fine-tuning: it lacks messages", mend=mend)
    if schema == "unknown":
        raise _unknown(value)
    row: dict[str, Any] = value if isinstance(value, dict) else {"messages": value}
    refuse_media(row, "the row")
    if schema == "text":
        if not isinstance(row["text"], str):
            raise DataError(f"text must be a string, not {kind(row['text'])}", mend="write a string")
        return Conversation(text=_filled(row["text"], "text"))
    messages, train = _TURNS[schema](row)
    if not messages:
        raise DataError("the conversation is empty", mend="leave the row out")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError("no assistant turn: nothing to learn from", mend="add the answer, or leave the row out")
    if system := text_of(row.get("system"), "system"):
        if messages[0]["role"] != "system":
            messages, train = [{"role": "system", "content": system}, *messages], [None, *train]
        elif messages[0]["content"] != system:
            raise DataError("two system prompts: the key system and a system message", mend="keep one of them")
    return Conversation(messages, train, tools=to_tools(row.get("tools") or row.get("functions")))


Turns = tuple[list[Message], list[bool | None]]


def _alpaca(row: dict[str, Any]) -> Turns:
    messages: list[Message] = []
    history = row.get("history") or []
    history = from_json(history, "history") if isinstance(history, str) else history
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError("history must be a list of pairs [question, answer]", snippet=shown(pair))
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    instruction, text = text_of(row["instruction"], "instruction"), text_of(row.get("input"), "input")
    messages.append({"role": "user", "content": "\n".join(part for part in (instruction, text) if part)})
    messages.append({"role": "assistant", "content": _filled(row["output"], "output")})
    return to_messages(messages)


def _prompt_completion(row: dict[str, Any]) -> Turns:
    prompt, trained = _side(row, "prompt", "user")
    answer, flags = _side(row, "completion", "assistant")
    trained = [
        False if said is None and m["role"] == "assistant" else said for m, said in zip(prompt, trained, strict=True)
    ]
    if answer and not any(message["role"] == "assistant" for message in answer):
        raise DataError("no assistant turn in the completion", mend="add the answer, or leave the row out")
    return prompt + answer, trained + flags


def _side(row: dict[str, Any], key: str, role: str) -> Turns:
    value = row[key]
    if isinstance(value, str):
        value = [{"role": role, "content": _filled(value, key) if role == "assistant" else value}]
    return to_messages([value] if is_message(value) else value, f"{key} message")


def _filled(value: Any, what: str) -> str:
    text = text_of(value, what)
    if not text.strip():
        raise DataError(f"the {what} is empty", mend="give it text, or leave the row out")
    return text


def _chat(row: dict[str, Any]) -> Turns:
    return to_messages(row["messages"] if row.get("messages") is not None else row["conversations"])


_TURNS = {"messages": _chat, "sharegpt": _chat, "alpaca": _alpaca, "prompt-completion": _prompt_completion}


def _unknown(value: Any) -> DataError:
    if isinstance(value, dict) and is_message(value):
        return DataError("a single message, not a row", mend='write {"messages": [...]} around the messages of a row')
    if isinstance(value, dict):
        keys = [str(key) for key in value]
        if not keys:
            return DataError("the row is empty: {}", mend="leave it out")
        under = value[keys[0]]
        if isinstance(under, list) and under and schema_of(under[0]) != "unknown":
            mend = "make that list the whole of a .json file"
            return DataError(f"the rows stand in a list under the key {snippet(keys[0])}", mend=mend)
        return DataError(f"unknown form of row with the keys {snippet(', '.join(keys))}", mend=nearest_schema(keys))
    if isinstance(value, list):
        if value and isinstance(value[0], (list, dict)) and schema_of(value[0]) != "unknown":
            return DataError("a list of rows, not a row", mend="write one row on a line, or name the file .json")
        first = kind(value[0]) if value else "nothing"
        return DataError(
            f"a list of messages must hold objects with a role, not {first}", mend='write {"messages": [...]}'
        )
    mend = 'write {"text": ...} around plain text' if isinstance(value, str) else 'write {"messages": [...]}'
    return DataError(f"a row must be an object, not {kind(value)}", mend=mend, snippet=shown(value))


def conversations(
    source: str, *, revision: str | None = None, progress: Progress | None = None
) -> Iterator[Conversation | DataError]:
    """The conversations of a source in order, and in place of each bad row its error.

    Raises:
        UserError: as `read_rows` does.
    """
    for row in read_rows(source, revision=revision, progress=progress):
        if row.error is not None:
            yield row.error
            continue
        try:
            yield to_conversation(row.value, row.file, row.line)
        except DataError as error:
            yield error


def well_formed(row: Row) -> bool:
    """Whether a row is of a form that some method takes, and good as such."""
    from litft.data.preferences import to_labelled, to_pair  # which read rows of chats, too

    try:
        if row.error is None:
            {"preference": to_pair, "kto": to_labelled}.get(schema_of(row.value), to_conversation)(row.value)
            return True
    except DataError:
        pass
    return False


class Check:
    r"""A look at every row of a source: iterate over it for the bad rows, then read the counts.

        found = check("chat.jsonl")
        for error in found:
            print(error)  # file:line: what; mend
        print("\n".join(found.summary()))
        sys.exit(2 if found.bad else 0)

    Attributes:
        rows: rows looked at so far.
        bad: bad ones among them.
        schemas: good ones by form.
    """

    def __init__(self, source: str, *, revision: str | None = None, progress: Progress | None = None) -> None:
        self.rows = self.bad = 0
        self.schemas: Counter[str] = Counter()
        self._rows = read_rows(source, revision=revision, progress=progress)

    def __iter__(self) -> Iterator[DataError]:
        from litft.data.preferences import to_labelled, to_pair  # which read rows of chats, too

        while True:
            try:
                row = next(self._rows, None)
                if row is None:
                    return
                if row.error:
                    raise row.error
                schema = schema_of(row.value)
                {"preference": to_pair, "kto": to_labelled}.get(schema, to_conversation)(row.value, row.file, row.line)
                self.schemas[schema] += 1
            except DataError as error:  # of the row, or of a file that breaks off: then there is no next one
                self.rows, self.bad = self.rows + 1, self.bad + 1
                yield error
            else:
                self.rows += 1

    def summary(self) -> list[str]:
        """A line for each form ("300 kto rows (for kto)"), and the last line, "N rows, M bad"."""
        method = {name: f" (for {method})" for name, method in METHODS.items()}
        rows = {name: f"{count} {name} row{'s' * (count != 1)}" for name, count in self.schemas.most_common()}
        lines = [text + method.get(name, "") for name, text in rows.items()]
        return [*lines, f"{self.rows} rows, {self.bad} bad"]


def check(source: str, *, revision: str | None = None, progress: Progress | None = None) -> Check:
    """Look at every row of a file, folder or data set; see `Check`.

    Raises:
        UserError: at once, if there is nothing to read.
    """
    return Check(source, revision=revision, progress=progress)
