"""Answers from a model: in batches, from a file, or as a stream of text."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from litft.data.conversation import Conversation
from litft.errors import DataError, UserError
from litft.infer.load import ChatModel, Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig

Progress = Callable[[int, int], None]
"""Called with (answers so far, answers in all)."""

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
    batch_size: int = 8,
    stop: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[str]:
    """Answer each prompt, in batches of like length.

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
        seed: of the sampling; the same seed, prompts and batch size give the same answers. None draws anew.
        batch_size: prompts answered at once. Greedy answers do not depend on it (beyond rounding).
        stop: texts that end an answer; they are not part of it.
        progress: called after each batch.

    Returns:
        The answers in the order of the prompts, without the end-of-turn token and the template's framing.

    Raises:
        UserError: a setting out of range, or a prompt that leaves no room for an answer.
        DataError: a conversation that the chat template refuses.
    """
    settings = decoding(bundle, max_new_tokens, temperature, top_p, top_k, stop)
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: at least 1")
    encoded = [bundle.encode(prompt) for prompt in prompts]
    rooms = [room(bundle, len(ids), max_new_tokens, f"prompt {i}") for i, ids in enumerate(encoded, 1)]
    answers = [""] * len(encoded)
    done = 0
    with seeded(seed, bundle):
        for batch in _batches(encoded, rooms, batch_size):
            settings.max_new_tokens = rooms[batch[0]]
            for i, ids in zip(batch, run(bundle, [encoded[i] for i in batch], settings), strict=True):
                answers[i] = tidy(bundle.decode(ids), stop)
            done += len(batch)
            if progress is not None:
                progress(done, len(encoded))
    return answers


def generate_file(
    bundle: ChatModel,
    data_file: str,
    out: str | Path,
    *,
    bad_rows: Literal["error", "skip"] = "error",
    batch_size: int = 8,
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
        UserError: `out` cannot be written or is the data file, or an option is out of range.
    """
    out = Path(out)
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    if out.resolve() == Path(data_file).resolve():
        raise UserError(f"--out {out}: is the data file itself; name another")
    asked, skipped = _questions(bundle, data_file, bad_rows)
    window = 32 * batch_size  # answered in order of length inside, written in the order of the rows
    with _new_file(out) as file:
        for start in range(0, len(asked), window):
            rows = asked[start : start + window]
            report = None if progress is None else _shifted(progress, start, len(asked))
            answers = generate(bundle, rows, batch_size=batch_size, progress=report, **options)
            for row, answer in zip(rows, answers, strict=True):
                file.write(json.dumps(_answered(row, answer), ensure_ascii=False) + "\n")
    return skipped


@contextlib.contextmanager
def _new_file(out: Path) -> Iterator[TextIO]:
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
) -> GenerationConfig:
    """The complete settings for one call of transformers' `generate`.

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
        values |= {key: value for key, value in (("top_p", top_p), ("top_k", top_k)) if value is not None}
    values |= {
        "do_sample": sample,
        "max_new_tokens": max_new_tokens,
        "max_length": None,
        "num_return_sequences": 1,
        "stop_strings": list(stop) or None,
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


def tidy(text: str, stop: Sequence[str] = ()) -> str:
    """An answer without what follows the first of the stop texts, without line breaks in front or blanks at the end."""
    found = [text.index(word) for word in stop if word in text]
    return text[: min(found, default=len(text))].lstrip("\r\n").rstrip()


@contextlib.contextmanager
def seeded(seed: int | None, bundle: ChatModel) -> Iterator[None]:
    """Inside the block random numbers follow `seed`; afterwards they go on as if nothing had happened."""
    import torch

    if seed is None:
        yield
        return
    device = bundle.model.device
    forked: dict[str, Any] = {"devices": []}
    if device.type != "cpu":
        forked = {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**forked):
        torch.manual_seed(seed)
        yield


def _batches(encoded: list[list[int]], rooms: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts to answer together: like length, longest first, and equal room for the answer.

    Longest first, so that a batch too large for the memory shows at once.
    """
    order = sorted(range(len(encoded)), key=lambda i: (-rooms[i], -len(encoded[i])))
    for _, group in itertools.groupby(order, key=lambda i: rooms[i]):
        indices = list(group)
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]


def run(bundle: ChatModel, rows: list[list[int]], settings: GenerationConfig, streamer: Any = None) -> list[list[int]]:
    """The new tokens for each row of prompt tokens, which are padded on the left to one length."""
    import torch
    from transformers import GenerationConfig

    width = max(map(len, rows))
    pad = settings.pad_token_id or 0  # any token: the mask hides it
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    model: Any = bundle.model
    own = model.generation_config
    model.generation_config = GenerationConfig()  # blank, or `generate` would fill what `settings` leaves out from it
    try:
        with torch.inference_mode():
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
                tokenizer=bundle.tokenizer if settings.stop_strings else None,
                streamer=streamer,
            )
    finally:
        model.generation_config = own
    return out[:, width:].tolist()
