"""The folder of a run: where it lies, whose it is, and what run.json says of it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from litft.engine.secrets import hide
from litft.errors import UserError

LOCK_S = 6.0
"""Seconds to wait for a folder: the data workers of a process that was killed outlive it by some."""
_locks: dict[Path, int] = {}
LIBRARIES = ("litft", "torch", "lightning", "transformers", "jsonargparse", "safetensors", "bitsandbytes")


def claim(out: str | None, name: str, resume: bool) -> Path:
    """Make a run's folder.

    Args:
        out: the folder asked for; a fresh `runs/0001-NAME` where None.
        name: of the method or tuner.
        resume: whether to go on in a used folder.

    Raises:
        UserError: a used folder without `resume`, an unused one with it, or one that cannot be written.
    """
    try:
        if out is None:
            if resume:
                raise UserError("--resume needs --out FOLDER, the run to go on with")
            folder = _fresh(Path("runs"), name)
            _lock(folder)
            return folder
        folder = Path(out)
        used = folder.is_dir() and any(folder.iterdir())
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {out}: is a file; name a folder")
        if used and not resume:
            raise UserError(f"--out {out}: already holds files; --resume goes on with that run, or name another folder")
        if used and not ((folder / "config.yaml").exists() or (folder / "checkpoints").exists()):
            raise UserError(f"--out {out}: nothing to resume there: no config.yaml and no checkpoints/")
        if resume and (link := _leads_out(folder)):
            raise UserError(
                f"--out {out}: {link.name} is a link to {os.readlink(link)}; a run writes into its own folder only\n"
                f"mend: remove {link}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
        _lock(folder)
        return folder
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out or 'runs'}: cannot be written: {reason}") from None


def _lock(folder: Path) -> None:
    """Keep other processes from the folder for as long as this one lives, however it ends.

    Raises:
        UserError: another one is at work there.
    """
    if sys.platform == "win32" or folder.resolve() in _locks:
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.2)
                continue
            os.close(handle)
            raise UserError(
                f"--out {folder}: another process is writing there\nmend: wait for its end, or name another folder"
            ) from None
        except OSError:  # a disk of the network without locks
            os.close(handle)
            return
        _locks[folder.resolve()] = handle
        return


def _leads_out(folder: Path) -> Path | None:
    """A link in a run folder that something else would be written through; `checkpoints` may lie on a larger disk."""
    checkpoints = folder / "checkpoints"
    for place in (folder, checkpoints):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.is_symlink() and path != checkpoints and not path.resolve().is_relative_to(place.resolve()):
                return path
    return None


def _fresh(parent: Path, name: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(m[1]) for p in parent.iterdir() if (m := re.match(r"(\d{4,})-", p.name))]
    number = max(taken, default=0) + 1
    while True:
        folder = parent / f"{number:04d}-{name}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # another run was first
            number += 1


def discard(folder: Path) -> None:
    """Take back the folder of a run that ended before it had anything to keep, so that its name is free again."""
    shutil.rmtree(folder, ignore_errors=True)
    if (handle := _locks.pop(folder.resolve(), None)) is not None:
        os.close(handle)
    with contextlib.suppress(OSError):  # `runs/`, where this was the first and only one
        if folder.parent == Path("runs"):
            folder.parent.rmdir()


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the folder one stands in, and whether files in it differ; None outside of a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


class RunFile:
    """run.json: written at the start, completed at the end; each time beside its place and renamed.

    Args:
        folder: the run folder.
        facts: what is known at the start.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path = folder / "run.json"
        self._began = time.monotonic()  # which no correction of the clock moves
        self.facts = {
            "command": ["litft", *sys.argv[1:]],
            "versions": versions(),
            "git": git_state(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outcome": "running",
            **facts,
        }
        self.write()

    def finish(self, outcome: str, **facts: Any) -> None:
        """Say how the run ended."""
        self.facts |= {"outcome": outcome, "seconds": round(time.monotonic() - self._began, 1), **facts}
        try:
            self.write()
        except OSError as error:  # must not stand before what ended the run
            self.path.with_suffix(".json.partial").unlink(missing_ok=True)
            print(f"{self.path}: cannot be written: {error.strerror}", file=sys.stderr)

    def write(self) -> None:
        """Write what is known."""
        beside = self.path.with_suffix(".json.partial")
        facts = hide(json.loads(json.dumps(self.facts, default=str)))
        beside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        beside.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; a last line torn by a crash is left out."""
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row.get("step", "").isdigit() and None not in row and None not in row.values()]
