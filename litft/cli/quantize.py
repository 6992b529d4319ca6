"""`litft quantize FOLDER`: a model in 8 or 4 bits, and what that costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from litft.cli.parsing import Parser, add_trust, counted, positive, progress, waiting

MODEL = "a run, an adapter or a model: a folder or a hub id"
FORMS = ("int8", "int4", "nf4")


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft quantize",
        "Store a model's linear layers in 8 or 4 bits, for plain transformers to load, and print the loss on held-out\n"
        "rows before and after.\n\n"
        "  int8   torchao, 1 byte a weight\n"
        "  int4   torchao, 4-bit values in a form that runs anywhere, but takes 1 byte a weight on disk\n"
        "  nf4    bitsandbytes, half a byte a weight",
        "litft quantize runs/0001-lora --to nf4 --out my-model-nf4",
    )
    parser.add_argument("FOLDER", help=MODEL)
    parser.add_argument("--to", required=True, choices=FORMS, help="the form")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--data", metavar="FILE", help="rows to measure on (those that the run held out)")
    parser.add_argument("--limit", type=positive, default=200, metavar="N", help="measure on so many rows (200)")
    add_trust(parser)
    args = parser.parse(argv)
    with waiting(f"reading {args.FOLDER}"):
        from litft.export.out import new_output
        from litft.export.quantize import quantize, settings_for
        from litft.models.resolve import resolve

        settings_for(args.to)  # a missing library, before anything long
        source = resolve(args.FOLDER, trust_remote_code=args.trust_remote_code)
        out = new_output(args.out, source)
        documents = _documents(args, source)
    with progress("quantising and measuring", None, "rows") as advance:
        made = quantize(
            source, out, to=args.to, documents=documents, trust_remote_code=args.trust_remote_code, progress=advance
        )
    print(f"{out}: {counted(made.layers, 'layer')} in {args.to},", end=" ")
    print(f"{made.bytes_before / 1e6:,.1f} MB -> {made.bytes_after / 1e6:,.1f} MB")
    if made.left:
        print(f"{made.left:,} weights of fused experts stay as they are")
    print(f"loss on {made.tokens:,} held-out tokens: {made.before:.4f} -> {made.after:.4f}")
    return 0


def _documents(args: argparse.Namespace, source: Any) -> Any:
    """The rows that `--data` names, or those that the run held out."""
    from litft.evaluate.losses import encode
    from litft.evaluate.models import Candidate
    from litft.evaluate.sets import read_set

    model = Candidate(args.FOLDER, trust_remote_code=args.trust_remote_code)
    if args.data is None:
        from litft.evaluate.held_out import held_out

        return held_out(Path(args.FOLDER), model.tokenizer, model.context_length, args.limit)
    rows = read_set("data", args.data, limit=args.limit)
    return encode(rows.conversations, model.tokenizer, max_length=model.longest_row())
