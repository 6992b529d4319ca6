"""`litft push FOLDER --repo NAME`: a model or adapter onto the model hub."""

from __future__ import annotations

import sys

from litft.cli.parsing import Parser, counted, truth


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    parser = Parser(
        "litft push",
        "Upload a run's final/, an adapter or a model folder to the model hub. Looks first for pickles, for tokens\n"
        "and passwords, and for paths of this machine. Log in before: hf auth login, or set HF_TOKEN.",
        "litft push runs/0001-lora --repo me/my-adapter --private false",
    )
    parser.add_argument("FOLDER", help="a run, an adapter or a model folder")
    parser.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME, or NAME for one of your own")
    parser.add_argument(
        "--private", type=truth, metavar="true|false", help="who may see it (a new one: only you; else as it is)"
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="the branch to commit to, made where it isn't there (main)"
    )
    parser.add_argument("--message", default="Upload with litft", metavar="TEXT", help="of the commit")
    parser.add_argument("--base", metavar="ID", help="the hub's id of the model that an adapter belongs to")
    parser.add_argument("--dry_run", action="store_true", help="only look, and list what would be uploaded")
    args = parser.parse(argv)
    from litft.export.push import check_name, full_name, prepare, push

    check_name(args.repo)
    repo = args.repo if args.dry_run else full_name(args.repo)
    upload = prepare(args.FOLDER, repo, args.base)
    for note in upload.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{counted(len(upload.files), 'file')}, {upload.size / 1e6:,.1f} MB", file=sys.stderr)
    if args.dry_run:
        print("\n".join(file.as_posix() for file in upload.files))
        return 0
    print(push(upload, repo, private=args.private, revision=args.revision, message=args.message))
    return 0
