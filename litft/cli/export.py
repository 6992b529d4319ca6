"""`litft export FOLDER`: the model in the form that something else takes."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from litft.cli.parsing import Parser, add_trust, progress, waiting
from litft.errors import UserError

MODEL = "a run, an adapter or a model: a folder or a hub id"


class Target(NamedTuple):
    """A form to export to.

    Attributes:
        what: a line for the help.
        function: module and name of what does it: see `export_hf` for the arguments and the returned lines.
        dtypes: what `--dtype` may be; the first is what most want, and no `--dtype` leaves the choice to the function.
    """

    what: str
    function: str
    dtypes: tuple[str, ...]


_PLAIN = ("bf16", "fp16", "fp32")
_GGUF = ("q8_0", "f16", "bf16", "f32", "q4_0", "q4_1", "q5_0", "q5_1")

TARGETS = {
    "hf": Target("a Hugging Face folder, for transformers and most servers", "litft.export.hf:export_hf", _PLAIN),
    "vllm": Target("what `vllm serve` takes; adapters with the flags", "litft.export.vllm:export_vllm", _PLAIN),
    "ollama": Target("a GGUF file and a Modelfile for Ollama", "litft.export.ollama:export_ollama", _GGUF),
    "gguf": Target("one file for llama.cpp and what is built on it", "litft.export.gguf:export_gguf", _GGUF),
}


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    forms = "\n".join(f"  {name:<7}{target.what} ({', '.join(target.dtypes)})" for name, target in TARGETS.items())
    parser = Parser(
        "litft export",
        f"Write a model in the form that something else takes; an adapter is merged into its base model.\n\n{forms}",
        "litft export runs/0001-lora --to hf --out my-model",
    )
    parser.add_argument("FOLDER", help=MODEL)
    parser.add_argument("--to", required=True, choices=TARGETS, help="the form")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", metavar="D", help="how numbers are stored (as in the model; in GGUF q8_0)")
    parser.add_argument(
        "--adapter", choices=("merge", "keep"), help="merge an adapter into its base, or write it as an adapter"
    )
    add_trust(parser)
    args = parser.parse(argv)
    target = TARGETS[args.to]
    if args.dtype not in (None, *target.dtypes):
        raise UserError(f"--dtype {args.dtype}: for --to {args.to} one of {', '.join(target.dtypes)}")
    with waiting(f"reading {args.FOLDER}"):
        from litft.export.out import new_output
        from litft.models.resolve import resolve

        source = resolve(
            args.FOLDER, trust_remote_code=args.trust_remote_code, scores=None if args.to == "hf" else False
        )
        out = new_output(args.out, source)
        module, _, name = target.function.partition(":")
        export = getattr(importlib.import_module(module), name)
    with progress("exporting", None, "steps") as advance:
        lines = export(
            source,
            out,
            dtype=args.dtype,
            adapter=args.adapter,
            trust_remote_code=args.trust_remote_code,
            progress=advance,
        )
    print("\n".join(lines))
    return 0
