"""Of several processes the first has the console; each other one writes what it says to a file of the run."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_console: int | None = None
_log: Path | None = None


def redirect(folder: Path, rank: int, world: int) -> None:
    """Send what this process prints, its libraries' words included, to `logs/rank-N.log` of the run's folder.

    Args:
        folder: of the run; all processes see it.
        rank: of this process.
        world: how many there are.
    """
    global _console, _log
    if _console is not None:
        return
    path = folder / "logs" / f"rank-{rank:04d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    _console, _log = os.dup(2), path
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file, number)
    os.close(file)
    print(f"rank {rank} of {world} on {socket.gethostname()}, process {os.getpid()}", flush=True)


def to_console(text: str) -> None:
    """Say something where the user looks, whichever process this is."""
    if _console is None:
        print(text, file=sys.stderr, flush=True)
    else:
        os.write(_console, f"{text}\n".encode(errors="backslashreplace"))


def log_of() -> Path | None:
    """The file that this process writes to, where it isn't the console."""
    return _log
