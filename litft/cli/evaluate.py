"""`litft evaluate FOLDER`: the loss of rows and the quality of answers, of one model or against another."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from litft.cli.generate import MODEL
from litft.cli.parsing import Parser, add_trust, positive, progress, waiting
from litft.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    args = _parser().parse(argv)
    if not args.data and not args.tasks:
        raise UserError("nothing to evaluate on\nmend: --data FILE, or --tasks NAME")
    if args.out and Path(args.out).is_dir() and any(Path(args.out).iterdir()):
        raise UserError(f"--out {args.out}: already holds files; name another folder")
    from litft.evaluate.sets import names_of

    data = names_of(args.data)
    import torch

    from litft.engine.run_folder import claim, discard
    from litft.evaluate.run import evaluate
    from litft.evaluate.table import table

    folder = claim(args.out, "evaluate", False)
    try:
        found = evaluate(
            args.FOLDER,
            data,
            baseline=args.baseline,
            limit=args.limit,
            answers=args.answers,
            extract=args.extract,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            batch_size=args.batch_size,
            seed=args.seed,
            train_on=args.train_on,
            max_length=args.max_length,
            date=args.date,
            bad_rows=args.bad_rows,
            device=args.device,
            dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
            trust_remote_code=args.trust_remote_code,
            tasks=[name.strip() for name in args.tasks.split(",") if name.strip()],
            include_path=args.include_path,
            num_fewshot=args.num_fewshot,
            apply_chat_template=args.apply_chat_template,
            progress=_shown,
        )
        found.save(folder)
    except BaseException:
        discard(folder)
        raise
    print(table(found.facts))
    print(f"\nin {folder}: evaluation.json" + ", answers.jsonl" * bool(found.answers))
    return 0


def _parser() -> Parser:
    parser = Parser(
        "litft evaluate",
        "Measure the loss on trained tokens, and let the model answer each row's last user turn: exact match, an\n"
        "extracted answer, ROUGE and chrF; beside the same of a baseline, with the interval of the difference.",
        "litft evaluate runs/0001-lora --data test.jsonl --baseline base --extract number",
    )
    add = parser.add_argument
    add("FOLDER", help=MODEL)
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="sets of rows, each under its name or that of its file",
    )
    add("--baseline", metavar="MODEL", help="compare with this model; base: what FOLDER was fine-tuned from")
    add("--out", metavar="DIR", help="folder for evaluation.json and answers.jsonl (a new one in runs/)")
    add("--limit", type=positive, metavar="N", help="only the first N rows of each set")
    add("--answers", type=_count, metavar="N", help="of them, answer the first N (all); 0 measures the loss only")
    add(
        "--extract",
        action="append",
        default=[],
        metavar="REGEX",
        help="compare what its last match finds (its first group), numbers as numbers; gsm8k: behind ####,"
        " number: the last one; may be repeated",
    )
    add("--tasks", default="", metavar="NAME,...", help="tasks of lm-eval (pip install 'litft[evaluate]'), too")
    add("--include_path", metavar="DIR", help="folder with task files (YAML) of your own")
    add("--num_fewshot", type=_count, metavar="N", help="examples before each question of a task; by default its own")
    add("--apply_chat_template", action="store_true", help="write the prompts of tasks as chats")
    add("--max_new_tokens", type=positive, default=256, metavar="N", help="longest answer (256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token, above 0 draws (0)")
    add("--seed", type=int, default=0, metavar="N", help="of drawing and of the bootstrap (0)")
    add("--batch_size", type=positive, default=8, metavar="N", help="rows answered at once (8)")
    add("--train_on", choices=("assistant", "last", "all"), help="what the loss counts; by default as FOLDER's run did")
    add("--max_length", type=positive, metavar="N", help="rows of more tokens have no loss; by default as the run did")
    add("--date", metavar="YYYY-MM-DD", help="today, to chat templates that write it; by default as the run did")
    add("--bad_rows", choices=("error", "skip"), default="error", help="a bad row is an error, or left out and counted")
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as stored, or as fits the device")
    add_trust(parser)
    return parser


@contextmanager
def _shown(what: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A progress line, or where nothing can be counted a word after a while."""
    if total is None:
        with waiting(what):
            yield lambda more: None
        return
    with progress(what, total, unit) as advance:
        yield advance


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 0 on")
    return int(text)
