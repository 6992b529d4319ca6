"""`litft chat FOLDER`: a conversation in the terminal."""

from __future__ import annotations

import sys

from litft.cli.generate import MODEL, add_decoding, decoding, load
from litft.cli.parsing import Parser


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft chat",
        "Talk to a model. The answers appear as they are written; the model remembers the conversation.\n"
        "/reset forgets it, /exit or Ctrl-D leaves, Ctrl-C stops an answer. Lines may also come through a pipe.",
        "litft chat runs/0001-lora --system 'Answer in one sentence.'",
    )
    parser.add_argument("FOLDER", help=MODEL)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    add_decoding(parser, max_new_tokens=1024, seed=None)
    args = parser.parse(argv)
    from litft.infer.chat import chat

    chat(load(args), system=args.system, input=None if sys.stdin.isatty() else sys.stdin, **decoding(args))
    return 0
