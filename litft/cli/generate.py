"""`litft generate FOLDER`: answer a prompt, or every row of a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from litft.cli.parsing import Parser, add_trust, counted, positive, progress, waiting
from litft.errors import UserError

MODEL = "a run, an adapter or a model: a folder or a hub id"


def add_decoding(parser: argparse.ArgumentParser, *, max_new_tokens: int, seed: int | None) -> None:
    """The flags that say how an answer is chosen; what nobody sets is the model's own choice."""
    add = parser.add_argument
    add(
        "--max_new_tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer ({max_new_tokens})",
    )
    add("--temperature", type=float, metavar="T", help="0 takes the likeliest token each time, above 0 draws")
    add("--top_p", type=float, metavar="P", help="draw from the likeliest tokens that together have this probability")
    add("--top_k", type=int, metavar="K", help="draw from this many likeliest tokens, 0 for all")
    add("--min_p", type=float, metavar="P", help="draw from tokens with this share of the likeliest one's probability")
    add(
        "--seed",
        type=int,
        default=seed,
        metavar="N",
        help=f"of the drawing ({'new each time' if seed is None else seed})",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The flags that say where and how the model is loaded."""
    add = parser.add_argument
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps")
    words = "what to compute in (as the weights are stored; float32 on a CPU that is slow in 16 bits)"
    add("--dtype", choices=("float32", "bfloat16", "float16"), help=words)
    add_trust(parser)


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_decoding`'s flags, as `litft.infer` takes them."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def load(args: argparse.Namespace) -> Any:
    """The model that FOLDER names, ready to answer."""
    with waiting(f"loading {args.FOLDER}"):
        import torch

        from litft.infer.load import load_for_inference

        dtype = getattr(torch, args.dtype) if args.dtype else None
        trusted = args.trust_remote_code
        return load_for_inference(args.FOLDER, device=args.device, dtype=dtype, trust_remote_code=trusted)


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft generate",
        "Answer one prompt and print only the answer; or answer the last user turn of every row of a file.",
        "litft generate runs/0001-lora --prompt 'Why is the sky blue?' --temperature 0\n"
        "         litft generate runs/0001-lora --data questions.jsonl --out answers.jsonl",
    )
    parser.add_argument("FOLDER", help=MODEL)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", metavar="TEXT", help="what the user says (plain text to go on from, without a chat template)"
    )
    what.add_argument("--data", metavar="FILE", help="answer every row of this file; needs --out")
    parser.add_argument("--system", metavar="TEXT", help="a system message before --prompt")
    parser.add_argument("--out", metavar="FILE", help="the .jsonl file to write: each row's messages and the answer")
    parser.add_argument("--batch_size", type=positive, default=16, metavar="N", help="rows answered at once (16)")
    parser.add_argument(
        "--bad_rows", choices=("error", "skip"), default="error", help="a bad row is an error, or left out and counted"
    )
    add_decoding(parser, max_new_tokens=256, seed=0)
    args = parser.parse(argv)
    if args.data is not None:
        return _answer_file(args)
    if args.out is not None:
        raise UserError("--out goes with --data; the answer to --prompt is printed")
    from litft.infer.generate import generate

    bundle = load(args)
    prompt: Any = args.prompt
    if args.system is not None:
        prompt = [{"role": "system", "content": args.system}, {"role": "user", "content": args.prompt}]
    with waiting("answering"):
        answer = generate(bundle, [prompt], **decoding(args))[0]
    print(answer)
    return 0


def _answer_file(args: argparse.Namespace) -> int:
    if args.out is None:
        raise UserError("--data needs --out: where shall the answers go?\nmend: --out answers.jsonl")
    if args.system is not None:
        raise UserError("--system goes with --prompt; rows bring their own system message")
    from litft.data.files import find_files
    from litft.infer.generate import check_new, generate_file

    find_files(args.data)  # a file that is not there, before the model is loaded
    check_new(Path(args.out))
    bundle = load(args)
    done = 0
    with progress("answering", None, "rows", wait=0) as advance:

        def count(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, total)
            done = now

        skipped = generate_file(
            bundle,
            args.data,
            args.out,
            bad_rows=args.bad_rows,
            batch_size=args.batch_size,
            progress=count,
            **decoding(args),
        )
    left = f", {counted(skipped, 'bad row')} left out" if skipped else ""
    print(f"{counted(done, 'answer')} in {args.out}{left}", file=sys.stderr)
    return 0
