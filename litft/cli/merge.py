"""`litft merge FOLDER`: an adapter and its base model become one model."""

from __future__ import annotations

from litft.cli.parsing import Parser, add_trust, amount, progress, waiting

MODEL = "a run or an adapter: a folder or a hub id"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft merge",
        "Merge an adapter into the 16-bit model that it was trained from: one folder that transformers loads.\n"
        "Computed in fp32, weight by weight, rounded once; read again and compared before the folder appears.",
        "litft merge runs/0001-lora --out my-model",
    )
    parser.add_argument("FOLDER", help=MODEL)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (as the base is stored)")
    parser.add_argument("--shard_gb", type=amount, default=5.0, metavar="GB", help="largest file of weights (5)")
    add_trust(parser)
    args = parser.parse(argv)
    with waiting(f"reading {args.FOLDER}"):
        from litft.export.hf import describe
        from litft.export.merge import check_mergeable, merge
        from litft.export.out import new_output
        from litft.models.resolve import resolve

        source = resolve(args.FOLDER, trust_remote_code=args.trust_remote_code, scores=None)
        check_mergeable(source)
        out = new_output(args.out, source)
    with progress("merging", None, "steps") as advance:
        written = merge(
            source,
            out,
            dtype=args.dtype,
            shard_bytes=args.shard_gb * 1e9,
            trust_remote_code=args.trust_remote_code,
            progress=advance,
        )
    print("\n".join(describe(source, written)))
    return 0
