"""`litft config list|show|copy|check`: the ready-made configurations, and a check of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from litft.cli.arguments import config_hub, expand, find_config, hub_names, read_config
from litft.cli.keys import METHODS, TUNERS
from litft.cli.parsing import Parser, choose
from litft.errors import UserError

NAME = "a YAML file, or a name of litft config list"


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    return choose(
        "litft config",
        argv,
        {
            "list": (list_names, "the names of the ready-made configurations"),
            "show": (show, "print one"),
            "copy": (copy, "copy one here, to be changed"),
            "check": (check, "find mistakes in one, without loading a model"),
        },
    )


def list_names(argv: list[str]) -> int:
    """`litft config list`: each name with the first comment of its file."""
    Parser("litft config list", "List the ready-made configurations.", "litft config list").parse(argv)
    names = hub_names()
    width = max(map(len, names), default=0)
    for name in names:
        first = (config_hub() / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        print(f"{name:<{width}}  {first[1:].strip() if first.startswith('#') else ''}".rstrip())
    return 0


def show(argv: list[str]) -> int:
    """`litft config show NAME_OR_FILE`."""
    parser = Parser("litft config show", "Print a configuration.", "litft config show smollm2/135m-lora")
    parser.add_argument("NAME_OR_FILE", help=NAME)
    print(_text(find_config(parser.parse(argv).NAME_OR_FILE)).rstrip("\n"))
    return 0


def copy(argv: list[str]) -> int:
    """`litft config copy NAME_OR_FILE [TO]`."""
    parser = Parser(
        "litft config copy",
        "Copy a configuration, to be changed; an existing file is never overwritten.",
        "litft config copy smollm2/135m-lora mine.yaml && litft finetune lora --config mine.yaml --data FILE",
    )
    parser.add_argument("NAME_OR_FILE", help=NAME)
    parser.add_argument("TO", nargs="?", default=".", help="a new file, or the folder to put it in (here by default)")
    args = parser.parse(argv)
    source, to = find_config(args.NAME_OR_FILE), Path(args.TO)
    to = to / source.name if to.is_dir() else to
    try:
        with source.open("rb") as old, to.open("xb") as new:
            shutil.copyfileobj(old, new)
    except FileExistsError:
        raise UserError(f"{to} exists and is not overwritten; name another file") from None
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror}") from None
    print(to)
    return 0


def check(argv: list[str]) -> int:
    """`litft config check NAME_OR_FILE`: read it as `litft finetune` would."""
    parser = Parser(
        "litft config check",
        "Read a configuration as litft finetune would: unknown keys, wrong types and values out of range are errors.\n"
        "Neither model nor data are touched, and the file need not name any data.",
        "litft config check mine.yaml",
    )
    parser.add_argument("NAME_OR_FILE", help=NAME)
    parser.add_argument("--method", choices=tuple(METHODS), help="of litft finetune (the name's end, or lora)")
    args = parser.parse(argv)
    name = args.NAME_OR_FILE
    ending = name.removesuffix(".yaml").rpartition("-")[2]
    method = args.method or (ending if ending in METHODS else "lora")
    from litft.cli.finetune import _parse, _quiet

    said = dict(read_config(name))
    chosen = {"model.tuner", "model.tuner.class_path"} & said.keys()
    named = None if chosen and method in TUNERS else method  # a file without a tuner is tried with the usual one
    words = expand(["--config", name], named)
    if "data.train" not in said:
        files = str(said.get("data.weights", "")).count(",") + 1  # one weight a file
        words.append(f"--data.train={json.dumps(['chats.jsonl'] * files)}")
    _quiet()
    config = _parse(words, method).config
    tuner = config.model.tuner.class_path.rpartition(".")[2]
    print(f"{name}: good; {len(said)} keys, {tuner} on {config.model.path}")
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
