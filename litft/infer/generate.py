"""Answers from a model: in batches, from a file, or as a stream of text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from litft.data.conversation import Conversation
from litft.errors import DataError, UserError
from litft.infer.engine import Engine, Request
from litft.infer.load import ChatModel, Prompt
from litft.infer.text import tidy

if TYPE_CHECKING:
    from transformers import GenerationConfig

Progress = Callable[[int, int], None]
"""Called with (answers so far, answers in all)."""

__all__ = ["decoding", "generate", "generate_file", "room", "tidy", "up_to_last_user_turn"]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def generate(
    bundle: ChatModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = 0,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    progress: Progress | None = None,
    min_p: float | None = None,
    first: int = 0,
) -> list[str]:
    """Answer each prompt, many at once.

    How to choose tokens is the model's own choice where nothing is said: its generation_config.json, as transformers
    and vLLM read it (many chat models name a temperature there; without one, decoding is greedy).

    Args:
        bundle: of `load_for_inference`.
        prompts: a string is one user turn (plain text to continue, where the model has no chat template).
        max_new_tokens: longest answer, in tokens; less where the model's context ends before.
        temperature: 0 takes the likeliest token each time; above 0 samples, from all tokens unless `top_p` or `top_k`
            or the model's own settings narrow them.
        top_p: sample from the likeliest tokens that together have this probability (0 to 1).
        top_k: sample from this many likeliest tokens; 0 is all.
        seed: of the sampling; an answer depends on it, its prompt and the prompt's number. None draws anew.
        batch_size: prompts answered at once. Answers do not depend on it (beyond rounding).
        stop: texts that end an answer; they are not part of it.
        progress: called whenever answers are complete.
        min_p: sample from the tokens with at least this share of the likeliest one's probability (0 to 1).
        first: the number of the first prompt, where they are part of a longer list.

    Returns:
        The answers in the order of the prompts, without the end-of-turn token and the template's framing.

    Raises:
        UserError: a setting out of range, or a prompt that leaves no room for an answer.
        DataError: a conversation that the chat template refuses.
    """
    settings = decoding(bundle, max_new_tokens, temperature, top_p, top_k, stop, min_p)
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: at least 1")
    encoded = [bundle.encode(prompt) for prompt in prompts]
    rooms = [room(bundle, len(ids), max_new_tokens, f"prompt {i}") for i, ids in enumerate(encoded, 1)]
    requests = [
        Request(ids, settings, longest, seed=None if seed is None else f"{seed}/{first + i}", stop=stop)
        for i, (ids, longest) in enumerate(zip(encoded, rooms, strict=True))
    ]
    done = 0

    def watch() -> None:
        nonlocal done
        now = sum(request.finish is not None for request in requests)
        if now > done and progress is not None:
            progress(now, len(requests))
        done = now

    # The longest first: neighbours in the queue are read together, and what the memory can't hold shows at once.
    Engine(bundle, slots=batch_size).run(sorted(requests, key=lambda request: -len(request.ids)), watch)
    return [request.text for request in requests]


def generate_file(
    bundle: ChatModel,
    data_file: str,
    out: str | Path,
    *,
    bad_rows: Literal["error", "skip"] = "error",
    batch_size: int = 16,
    progress: Progress | None = None,
    **options: Any,
) -> int:
    """Answer the last user turn of every row and write JSONL: the messages up to it, and the answer.

    All rows are read and encoded before the first is answered, so that a bad one costs no time. The file appears when
    it is complete; what was answered before an interruption stays in `OUT.part`.

    Args:
        bundle: of `load_for_inference`.
        data_file: rows of any schema that fine-tuning takes; what follows the last user turn is left out.
        out: the file to write, a row `{"messages": [...]}` for each row, in their order; `tools` are kept.
        bad_rows: a row that cannot be used is an error, or is left out.
        batch_size: rows answered at once.
        progress: called with (answers so far, answers in all).
        options: the other keyword arguments of `generate`.

    Returns:
        The number of rows left out.

    Raises:
        DataError: a bad row, or one that leaves no room for an answer.
        UserError: `out` cannot be written or is there, or an option is out of range.
    """
    out = Path(out)
    check_new(out)
    asked, skipped = _questions(bundle, data_file, bad_rows)
    window = 32 * batch_size  # answered in order of length inside, written in the order of the rows
    with new_file(out) as file:
        for start in range(0, len(asked), window):
            rows = asked[start : start + window]
            report = None if progress is None else _shifted(progress, start, len(asked))
            answers = generate(bundle, rows, batch_size=batch_size, progress=report, first=start, **options)
            for row, answer in zip(rows, answers, strict=True):
                file.write(json.dumps(_answered(row, answer), ensure_ascii=False) + "\n")
    return skipped


def check_new(out: Path) -> None:
    """Refuse a place that holds something.

    Raises:
        UserError: it does.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    if out.resolve().exists():
        raise UserError(f"--out {out}: is there, and not overwritten; name another file")


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[TextIO]:
    """A file that appears as `out` when the block ends well; what an interruption left of it stays as `OUT.part`."""
    part = out.with_name(f"{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
        os.replace(part, out)
    finally:
        if part.exists() and part.stat().st_size == 0:
            part.unlink()


def _questions(bundle: ChatModel, data_file: str, bad_rows: str) -> tuple[list[Conversation], int]:
    """Every row up to its last user turn, and how many rows were left out."""
    from litft.data.files import read_rows
    from litft.data.rows import to_conversation

    asked: list[Conversation] = []
    skipped = 0
    for row in read_rows(data_file):
        try:
            if row.error is not None:
                raise row.error
            question = up_to_last_user_turn(to_conversation(_closed(row.value), row.file, row.line))
            room(bundle, len(bundle.encode(question)), 1, "the row")
            asked.append(question)
        except UserError as error:
            if bad_rows == "error":
                if isinstance(error, DataError):
                    raise
                raise DataError(str(error), file=row.file, line=row.line) from error
            skipped += 1
    return asked, skipped


def _closed(row: Any) -> Any:
    """A row that waits for its answer gets one, as rows for training have it; it is cut off again with the rest."""
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        return row
    for key in ("messages", "conversations"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            turn = {"from": "gpt", "value": "."} if "from" in turns[-1] else {"role": "assistant", "content": "."}
            return row | {key: [*turns, turn]}
    if "instruction" in row:
        return row | {"output": "."}
    if "prompt" in row and not row.keys() & {"chosen", "rejected", "label"}:
        return row | {"completion": "."}
    return row


def up_to_last_user_turn(conversation: Conversation) -> Conversation:
    """The conversation as it stood when the user last spoke.

    Raises:
        DataError: the user never does.
    """
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "user"]
    if not turns:
        mend = "give it a message with the role user, or leave such rows out with --bad_rows skip"
        raise DataError("no user turn to answer", file=conversation.file, line=conversation.line, mend=mend)
    end = turns[-1] + 1
    return dataclasses.replace(conversation, messages=conversation.messages[:end], train=conversation.train[:end])


def _answered(question: Conversation, answer: str) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": [*question.messages, {"role": "assistant", "content": answer}]}
    return row | ({"tools": question.tools} if question.tools else {})


def _shifted(progress: Progress, start: int, total: int) -> Progress:
    return lambda done, _: progress(start + done, total)


def decoding(
    bundle: ChatModel,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    min_p: float | None = None,
) -> GenerationConfig:
    """The complete settings, in transformers' form: the model's own, and over them what is said here.

    Raises:
        UserError: a value out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: at least 1")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature}: 0 (greedy) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p}: above 0, at most 1")
    if top_k is not None and top_k < 0:
        raise UserError(f"--top_k {top_k}: 0 (all tokens) or more")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UserError(f"--min_p {min_p}: 0 to 1")
    if "" in stop:
        raise UserError("--stop '': an empty text ends every answer before it begins")

    from transformers import GenerationConfig

    values = bundle.settings.to_dict()
    sample = bool(values.get("do_sample")) if temperature is None else temperature > 0
    if not sample:
        # Settings that only sampling reads would each cause a warning.
        values = {key: value for key, value in values.items() if key not in _SAMPLING}
    elif temperature is not None:
        # transformers would take the 50 likeliest tokens where nobody said so.
        given = {"temperature": temperature, "top_k": values.get("top_k") or 0}
        values |= given
    if sample:
        said = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
        values |= {key: value for key, value in said.items() if value is not None}
    values |= {
        "do_sample": sample,
        "max_new_tokens": max_new_tokens,
        "max_length": None,
        "num_return_sequences": 1,
        "stop_strings": None,  # the engine looks for them itself
        "eos_token_id": sorted(bundle.stop_ids) or None,
        "use_cache": True,
    }
    return GenerationConfig(**values)


def room(bundle: ChatModel, prompt_tokens: int, max_new_tokens: int, what: str) -> int:
    """How many tokens the answer may have: `max_new_tokens`, or fewer where the model's context ends before.

    Raises:
        UserError: nothing is left, or there is nothing to continue.
    """
    if prompt_tokens == 0:
        raise UserError(f"{what} is empty")
    limit = bundle.context_length or prompt_tokens + max_new_tokens
    if prompt_tokens >= limit:
        raise UserError(f"{what} has {prompt_tokens:,} tokens, and the model takes {limit:,} together with the answer")
    return min(max_new_tokens, limit - prompt_tokens)
