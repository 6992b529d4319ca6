"""What the small verbs share: a strict argument parser, a first word that chooses, and progress on stderr."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from litft.errors import UserError

PATIENCE_S = 2.0
"""Seconds after which whoever waits is told what for."""

Action = Callable[[list[str]], int]


class Parser(argparse.ArgumentParser):
    """argparse as all of litft answers: no abbreviations, unknown flags name the nearest, mistakes are `UserError`.

    Args:
        command: the words before the arguments ("litft data check").
        description: what it does, in a sentence or two.
        example: a command line to begin with.
    """

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=command,
            description=description,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting: one place prints what went wrong.

        Raises:
            UserError: always.
        """
        if flag := re.fullmatch(r"argument (\S+).*: expected (one|at least one) argument", message):
            name = flag[1].rstrip(",")
            message = f"{name} needs a value; one that begins with a dash is written {name}=VALUE"
        message = message.replace("the following arguments are required:", "missing:").removeprefix("argument ")
        raise UserError(f"{message}\nmend: {self.prog} --help")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The values of the arguments.

        Raises:
            UserError: something is missing, unknown or of the wrong type.
        """
        args, rest = self.parse_known_args(argv)
        if not rest:
            return args
        word = next((word for word in rest if word.startswith("-")), None)
        if word is None:
            raise UserError(
                f"{rest[0]!r} is a word too many; text of several words stands in quotes\nmend: {self.prog} --help"
            )
        flag, known = word.partition("=")[0], re.findall(r"--[\w.]+", self.format_help())
        near = difflib.get_close_matches(flag.replace("-", "_"), [name.replace("-", "_") for name in known], n=1)
        hint = f"; did you mean --{near[0].lstrip('_')}?" if near else ""
        raise UserError(f"unknown flag {flag}{hint}\nall flags: {self.prog} --help")


def truth(text: str) -> bool:
    """The value of a flag that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false")
    return text.lower() == "true"


def positive(text: str) -> int:
    """The value of a flag that counts from 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on")
    return int(text)


def amount(text: str) -> float:
    """The value of a flag that is a size."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0")
    return value


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The one flag that lets a model's own Python code run, named as `litft finetune` names it."""
    parser.add_argument(
        "--model.trust_remote_code",
        dest="trust_remote_code",
        type=truth,
        default=False,
        metavar="true|false",
        help="run Python code that the model brings; only for models whose code you have read",
    )


def choose(command: str, argv: list[str], actions: dict[str, tuple[Action, str]]) -> int:
    """Run the action that the first word names.

    Args:
        command: the words before it ("litft data").
        argv: the words after `command`.
        actions: what each word does, and a line about it.

    Returns:
        The action's exit code.

    Raises:
        UserError: no word, or an unknown one.
    """
    if argv and argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<8}{text}" for name, (_, text) in actions.items())
        print(f"usage: {command} {'|'.join(actions)} ...\n\n{lines}\n\nmore: {command} {next(iter(actions))} --help")
        return 0
    if not argv or argv[0] not in actions:
        near = difflib.get_close_matches(argv[0], actions, n=1) if argv else []
        what = f"{argv[0]!r} is none of them" if argv else "what shall it do?"
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{command} {'|'.join(actions)}: {what}{hint}\nmend: {command} --help")
    return actions[argv[0]][0](argv[1:])


@contextmanager
def progress(what: str, total: int | None, unit: str, *, wait: float = PATIENCE_S) -> Iterator[Callable[..., None]]:
    """A progress line on stderr.

    Args:
        what: is going on.
        total: how much there is to do; None where nobody knows.
        unit: what is counted; "B" for bytes.
        wait: seconds before the line appears.

    Yields:
        A function to call with how much more was done, and with the total where only then it is known.
    """
    from tqdm import tqdm

    screen = sys.stderr.isatty()
    with tqdm(
        desc=what,
        total=total,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        delay=wait,
        leave=not screen,  # a file keeps the last line, a screen is wiped
        mininterval=0.2 if screen else PATIENCE_S,
        file=sys.stderr,
    ) as bar:

        def advance(more: int, total: int | None = None) -> None:
            bar.total = total or bar.total
            bar.update(more)

        yield advance


def counted(count: int, what: str) -> str:
    """So many of something: one row, but 2,000 rows."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def say(text: str) -> None:
    """Print a line on stdout, past a progress line on the same screen."""
    if not sys.stdout.isatty():
        print(text)
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on stderr what is going on inside the block, if that takes long."""
    timer = threading.Timer(PATIENCE_S, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
