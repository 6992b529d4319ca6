"""`litft download ID`: fetch a model, so that later commands find it here."""

from __future__ import annotations

import sys

from litft.cli.parsing import Parser, add_trust


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft download",
        "Fetch a model from the hub (safetensors, configuration and tokenizer) and print the folder it lies in.\n"
        "HF_ENDPOINT names a mirror, HF_TOKEN a log-in for gated models, HF_HOME where downloads are kept.",
        "litft download Qwen/Qwen3-0.6B",
    )
    parser.add_argument("ID", help="the id of a hub model (org/name), or smollm2-135m-instruct")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    add_trust(parser)
    args = parser.parse(argv)
    from litft.models.resolve import resolve

    source = resolve(args.ID, revision=args.revision, trust_remote_code=args.trust_remote_code)
    folders = [source.folder] if source.adapter is None else [source.adapter, source.folder]
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    print(folders[0])
    if source.adapter is not None:
        print(f"an adapter; its base model: {source.folder}", file=sys.stderr)
    print(f"{size / 1e6:,.0f} MB; next: litft finetune lora --model {args.ID} --data FILE", file=sys.stderr)
    return 0
