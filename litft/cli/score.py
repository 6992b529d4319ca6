"""`litft score FOLDER`: numbers of a reward model for every row of a file."""

from __future__ import annotations

import sys
from pathlib import Path

from litft.cli.parsing import Parser, add_trust, counted, positive, progress, waiting


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft score",
        "Score every row of a file with a reward model: chats get a score, pairs one for each answer.",
        "litft score runs/0001-reward --data pairs.jsonl --out scores.jsonl",
    )
    parser.add_argument("FOLDER", help="a run of litft finetune reward, its adapter or model: a folder or a hub id")
    parser.add_argument("--data", metavar="FILE", required=True, help="the rows")
    parser.add_argument("--out", metavar="FILE", required=True, help="the .jsonl file to write: each row and its score")
    parser.add_argument("--batch_size", type=positive, default=8, metavar="N", help="conversations at once (8)")
    parser.add_argument(
        "--bad_rows", choices=("error", "skip"), default="error", help="a bad row is an error, or left out and counted"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, mps")
    add_trust(parser)
    args = parser.parse(argv)
    from litft.data.files import find_files
    from litft.infer.generate import check_new
    from litft.infer.score import load_scorer, score_file

    find_files(args.data)  # a file that is not there, before the model is loaded
    check_new(Path(args.out))
    with waiting(f"loading {args.FOLDER}"):
        bundle = load_scorer(args.FOLDER, device=args.device, trust_remote_code=args.trust_remote_code)
    done = 0
    with progress("scoring", None, "answers") as advance:

        def count(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, total)
            done = now

        options = {"bad_rows": args.bad_rows, "batch_size": args.batch_size, "progress": count}
        found = score_file(bundle, args.data, args.out, **options)
    left = f", {counted(found['skipped'], 'bad row')} left out" if found["skipped"] else ""
    right = f"; the chosen answer scores higher in {found['accuracy']:.1%}" if found["accuracy"] is not None else ""
    print(f"{counted(found['rows'], 'row')} in {args.out}{left}{right}", file=sys.stderr)
    return 0
