"""`litft data check|show|stats`: look at training data before it costs a run."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litft.cli.parsing import Parser, add_trust, choose, counted, positive, progress, say, truth, waiting
from litft.errors import DataError, UserError
from litft.models.alias import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from litft.data.files import Row
    from litft.data.rows import Check
    from litft.data.template import ChatEncoder, Encoded
    from litft.models.resolve import ModelSource

FIRST_ROWS = 10  # shown to a reader who names none
BAR = 50  # characters of the histogram's longest bar
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SOURCE = "a file (.jsonl, .json, .parquet, .csv, also .gz, .zst), a folder of them, or a data set id"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    return choose(
        "litft data",
        argv,
        {
            "check": (check, "find every bad row, and say how to mend it"),
            "show": (show, "what the model gets to see, and which part of it is trained"),
            "stats": (stats, "how long the rows are, and how much of them is trained"),
        },
    )


def check(argv: list[str]) -> int:
    """`litft data check FILE`; returns 2 if any row is bad."""
    parser = Parser(
        "litft data check",
        "Read every row and print each bad one as `file:line: what; mend`, then the forms of the others.\n"
        "With --model every row is also written with the model's chat template, as training would.",
        "litft data check chats.jsonl --model smollm2-135m-instruct",
    )
    parser.add_argument("FILE", nargs="+", help=SOURCE)
    _add_encoding(parser, model=None)
    args = parser.parse(argv)
    from litft.data.files import total_bytes
    from litft.data.rows import check

    encoder = _encoder(args, args.FILE)[0] if args.model else None
    rows = bad = 0
    for source in args.FILE:
        with progress(f"checking {Path(source).name}", total_bytes(source), "B") as advance:
            found = check(source, revision=args.revision, progress=advance)
            for error in found:
                say(str(error))
        if encoder is not None:
            for error in _refused(source, encoder, found, args.revision):
                say(str(error))
        rows, bad = rows + found.rows, bad + found.bad
        summary = found.summary()
        print("\n".join(summary) if len(args.FILE) == 1 else f"{source}: {', '.join(summary)}")
    if len(args.FILE) > 1:
        print(f"{rows} rows, {bad} bad")
    return 2 if bad else 0


def _refused(source: str, encoder: ChatEncoder, found: Check, revision: str | None) -> Iterator[DataError]:
    """The rows of a good form that cannot be encoded; they are added to the count of bad ones."""
    from litft.data.files import read_rows, total_bytes
    from litft.data.rows import well_formed

    notes: Counter[str] = Counter()
    with progress(f"encoding {Path(source).name}", total_bytes(source), "B") as advance:
        rows = read_rows(source, revision=revision, progress=advance)
        while True:
            try:
                row = next(rows, None)
            except DataError:  # the file breaks off here, as the check has said
                break
            if row is None:
                break
            if not well_formed(row):  # so has it said this
                continue
            try:
                for _, encoded in _documents(encoder, row):
                    notes.update(encoded.notes)
            except DataError as error:
                found.bad += 1
                yield error
    _print_notes(notes)


def show(argv: list[str]) -> int:
    """`litft data show FILE`; returns 2 if a row of those shown is bad."""
    parser = Parser(
        "litft data show",
        "Show the rows as the model gets them: its chat template around the messages, and what is trained, in colour\n"
        "(in [[double brackets]] where the output is no terminal).",
        "litft data show chats.jsonl --rows 3",
    )
    parser.add_argument("FILE", help=SOURCE)
    _add_encoding(parser, model=DEFAULT_MODEL)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a row: row, tokens, trained (0 or 1), text"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rows", type=positive, metavar="N", help=f"the first N rows ({FIRST_ROWS}; all with --json)")
    which.add_argument("--row", type=positive, metavar="K", help="only row K, counted from 1")
    parser.add_argument("--color", action="store_true", help="colour also where the output is no terminal")
    args = parser.parse(argv)
    from litft.data.files import read_rows, total_bytes

    encoder = _encoder(args, [args.FILE])[0]
    color = args.color or (sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    first = args.row - 1 if args.row else 0
    last = args.row or args.rows or (None if args.json else FIRST_ROWS)
    done = bad = 0
    notes: Counter[str] = Counter()
    total = total_bytes(args.FILE) if last is None else None
    watched = sys.stdout.isatty()  # then the rows themselves show that it goes on
    bar = progress(f"encoding {Path(args.FILE).name}", total, "B" if total else "rows")
    with contextlib.nullcontext(lambda more: None) if watched else bar as advance:
        rows = enumerate(read_rows(args.FILE, revision=args.revision, progress=advance if total else None), 1)
        for number, row in itertools.islice(rows, first, last):
            done += 1
            if not total:
                advance(1)
            try:
                documents = _documents(encoder, row)
            except DataError as error:
                bad += 1
                print(error, file=sys.stderr)
                continue
            if args.json:
                print(_as_json(number, documents))
            for name, encoded in documents:
                notes.update(encoded.notes)
                if not args.json:
                    what = f"{name}: " * bool(name) + f"{len(encoded.ids)} tokens, {sum(encoded.trained)} trained"
                    print(f"row {number} ({row.file}:{row.line}): {what}")
                    print(_marked(encoder.tokenizer, encoded, color).rstrip("\n"), end="\n\n")
        more = not args.json and args.rows is None and args.row is None and next(rows, None) is not None
    if not done:
        raise UserError(f"--row {args.row}: {args.FILE} has fewer rows")
    _print_notes(notes)
    if more:
        print(f"(the first {FIRST_ROWS} rows; others with --rows N or --row K)", file=sys.stderr)
    return 2 if bad else 0


def _documents(encoder: ChatEncoder, row: Row) -> list[tuple[str, Encoded]]:
    """The documents of a row by name: chosen and rejected of a pair, else one without a name, or good or bad.

    Raises:
        DataError: the row is bad.
    """
    from litft.data.encoding import encode_any

    _, found, *more = encode_any(encoder, row)
    if isinstance(found, list):
        return list(zip(("chosen", "rejected"), found, strict=True))
    return [(("good" if more[1] else "bad") if len(more) > 1 else "", found)]


def _as_json(number: int, documents: list[tuple[str, Encoded]]) -> str:
    parts = {
        name: {"tokens": list(e.ids), "trained": [int(flag) for flag in e.trained], "text": e.text}
        for name, e in documents
    }
    row: dict[str, Any] = {"row": number}
    if len(parts) > 1:
        return json.dumps(row | parts, ensure_ascii=False)
    ((name, part),) = parts.items()
    return json.dumps(row | ({"label": name == "good"} if name else {}) | part, ensure_ascii=False)


def _marked(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, color: bool) -> str:
    """The text with the trained parts in green, or in double brackets."""
    from litft.data.shown import pieces, visible

    marked = []
    for text, trained in pieces(tokenizer, encoded.ids, encoded.trained):
        piece = visible(text)
        if trained and color:  # line by line, as pagers forget colours at the end of a line
            piece = re.sub(r"[^\n]+", "\x1b[32m\\g<0>\x1b[0m", piece)
        marked.append(f"[[{piece}]]" if trained and not color else piece)
    return "".join(marked)


def stats(argv: list[str]) -> int:
    """`litft data stats FILE`; returns 2 if any row is bad."""
    parser = Parser(
        "litft data stats",
        "Write every row with the model's chat template and count its tokens: lengths, the share that is trained, a\n"
        "histogram, and how many rows are too long.",
        "litft data stats chats.jsonl --data.max_length 1024",
    )
    parser.add_argument("FILE", help=SOURCE)
    _add_encoding(parser, model=DEFAULT_MODEL)
    parser.add_argument(
        "--data.max_length",
        "--max_length",
        dest="max_length",
        type=positive,
        metavar="N",
        help="longest row in tokens (what litft finetune takes by default: 4096, or less where the model's context is)",
    )
    parser.add_argument("--json", action="store_true", help="the numbers as one JSON object")
    args = parser.parse(argv)
    from litft.models.load import load_config

    encoder, model = _encoder(args, [args.FILE])
    context = getattr(load_config(model, trust_remote_code=args.trust_remote_code), "max_position_embeddings", None)
    found = _measure(args.FILE, encoder, min(n for n in (args.max_length or _default_length(), context) if n), args)
    for line in found.pop("skipped"):
        print(line, file=sys.stderr)
    _print_notes(Counter(found["notes"]))
    lengths = found.pop("lengths")
    print(json.dumps(found, indent=2) if args.json else "\n".join([*_stats_lines(found), *_histogram(lengths)]))
    return 2 if found["bad"] else 0


def _default_length() -> int:
    from litft.data.chat import DEFAULT_MAX_LENGTH

    return DEFAULT_MAX_LENGTH


def _measure(source: str, encoder: ChatEncoder, limit: int, args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of a source, each token counted as training counts it."""
    from litft.data import tokens
    from litft.data.encoding import encode_any
    from litft.data.files import read_rows

    size = sum(file.stat().st_size for file in [Path(source)] if file.is_file())
    with tempfile.TemporaryDirectory() as folder, progress(f"encoding {Path(source).name}", None, "rows") as advance:
        store = tokens.encode_file(
            lambda: read_rows(source, revision=args.revision),
            functools.partial(encode_any, encoder),
            Path(folder) / "tokens",
            file=source,
            skip_bad=True,
            workers=min(8, os.cpu_count() or 1) if size > tokens.PARALLEL_FROM else 1,
            progress=lambda done: advance(1),
        )
        lengths, trained = store.lengths, store.trained_counts()
        skipped, bad, schemas, notes = store.skipped, store.bad, store.schemas, store.notes
    if not len(lengths):
        raise UserError(f"{source}: no usable row; the first of {bad} bad ones:\n{skipped[0]}")
    return {
        "rows": len(store),
        "bad": bad,
        "schemas": schemas,
        "tokens": int(lengths.sum()),
        "trained_tokens": int(trained.sum()),
        "length": _summary(lengths),
        "trained": _summary(trained),
        "max_length": limit,
        "longer": int((lengths > limit).sum()),
        "notes": notes,
        "skipped": skipped,
        "lengths": lengths,
    }


def _summary(counts: np.ndarray) -> dict[str, float]:
    import numpy as np

    levels = {f"p{q}": round(float(np.percentile(counts, q)), 1) for q in PERCENTILES}
    return {"mean": round(float(counts.mean()), 1), "min": int(counts.min()), **levels, "max": int(counts.max())}


def _stats_lines(found: dict[str, Any]) -> list[str]:
    forms = ", ".join(f"{count:,} {name}" for name, count in found["schemas"].items())
    share = found["trained_tokens"] / found["tokens"]
    table = [
        f"{name:<12}" + "".join(f"{value:>8,.0f}" for value in found[name].values()) for name in ("length", "trained")
    ]
    longer = f"{counted(found['longer'], 'row')} longer than {found['max_length']:,} tokens would be dropped"
    return [
        f"rows        {found['rows']:,} ({forms}), {found['bad']:,} bad",
        f"tokens      {found['tokens']:,}, of which {found['trained_tokens']:,} trained ({share:.1%})",
        "",
        f"{'a row':<12}" + "".join(f"{name:>8}" for name in found["length"]),
        *table,
        "",
        longer + (" (--data.max_length, --data.overlong truncate)" if found["longer"] else ""),
    ]


def _histogram(lengths: np.ndarray) -> list[str]:
    """A bar for each range of lengths."""
    from litft.data.shown import histogram

    edges, counts = histogram(lengths)
    digits = len(f"{edges[-1]:,}")
    lines = ["", "tokens in a row"]
    for i, count in enumerate(counts):
        bar = "#" * -(-BAR * count // max(counts))  # rounded up: no row goes unseen
        lines.append(f"{edges[i]:>{digits},} - {edges[i + 1] - 1:>{digits},} {bar:<{BAR}} {count:,}")
    return lines


def _add_encoding(parser: argparse.ArgumentParser, model: str | None) -> None:
    """The flags that decide a row's tokens and mask, named as in `litft finetune`."""
    default = f"({model} by default)" if model else "(without one only the rows' form is checked)"
    parser.add_argument("--model", default=model, metavar="M", help=f"a folder, a run or a hub id {default}")
    parser.add_argument(
        "--data.chat_template", "--chat_template", dest="chat_template", metavar="FILE", help="a Jinja file, or chatml"
    )
    parser.add_argument(
        "--data.train_on",
        "--train_on",
        dest="train_on",
        choices=("assistant", "last", "all"),
        default="assistant",
        help="train every answer (the default), only the last one, or every token",
    )
    parser.add_argument(
        "--data.allow_special_tokens",
        "--allow_special_tokens",
        dest="allow_special_tokens",
        type=truth,
        default=False,
        metavar="true|false",
        help="text of users, tools and the system that spells a control token becomes that token",
    )
    parser.add_argument(
        "--model.add_tokens",
        dest="add_tokens",
        type=truth,
        default=False,
        metavar="true|false",
        help="add the control tokens that the chat template needs and the tokenizer lacks",
    )
    parser.add_argument(
        "--data.revision", "--revision", dest="revision", metavar="REV", help="of a data set on the hub"
    )
    parser.add_argument("--model.revision", dest="model_revision", metavar="REV", help="of a model on the hub")
    add_trust(parser)


def _encoder(args: argparse.Namespace, sources: list[str]) -> tuple[ChatEncoder, ModelSource]:
    """The encoder that these flags ask for, and the model that it writes for."""
    only_text = all(
        _is_text(source, args.revision) for source in sources
    )  # before anything is loaded: a source may not be there
    with waiting(f"loading the tokenizer of {args.model}"):
        from litft.data.template import ChatEncoder, find_template, missing_tokens
        from litft.models.load import add_to_tokenizer, load_tokenizer
        from litft.models.resolve import resolve

        trust = args.trust_remote_code
        model = resolve(args.model, revision=args.model_revision, weights=False, trust_remote_code=trust)
        tokenizer = load_tokenizer(model, trust_remote_code=trust)
        tokenizer.model_max_length = sys.maxsize  # what is too long is counted here, not warned of
    if args.chat_template or not only_text:  # plain text needs no template
        find_template(tokenizer, args.chat_template, add_tokens=args.add_tokens)
        if args.add_tokens:
            add_to_tokenizer(tokenizer, missing_tokens(tokenizer))
    encoder = ChatEncoder(tokenizer, train_on=args.train_on, allow_special_tokens=args.allow_special_tokens)
    return encoder, model


def _is_text(source: str, revision: str | None) -> bool:
    """Whether the rows are plain text, by the first of them."""
    from litft.data.files import read_rows
    from litft.data.schemas import schema_of

    with contextlib.suppress(DataError):  # of a file that breaks off at once; whoever reads on will meet it
        first = next(read_rows(source, revision=revision))
        return first.error is None and schema_of(first.value) == "text"
    return False


def _print_notes(notes: Counter[str]) -> None:
    for note, count in notes.most_common():
        print(f"note: {note} ({counted(count, 'row')})", file=sys.stderr)
