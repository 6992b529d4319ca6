"""The checkpoints of a run on disk: which are whole, which is the newest, and how one gets its name."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from pathlib import Path

from litft.engine import part_files

FILE = "state.ckpt"
_NAME = re.compile(r"step-(\d+)")


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of an optimizer step belongs."""
    return folder / f"step-{step:06d}"


def half_of(place: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return place.with_name(f".{place.name}.partial")


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint's file."""
    return int(checkpoint.parent.resolve().name.removeprefix("step-"))


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `checkpoints/`, oldest first; links and what else lies there are none of them."""
    found = [(int(m[1]), p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name)) and not p.is_symlink()]
    return [place for _, place in sorted(found) if (place / FILE).is_file()]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint's file."""
    found = complete(folder)
    return found[-1] / FILE if found else None


def sum_of(file: Path) -> Path:
    """Where the checksum of a checkpoint's file lies, as `sha256sum -c` reads it."""
    return file.with_name(f"{file.name}.sha256")


def is_whole(file: Path) -> bool:
    """Whether a checkpoint's files have the bytes that were written; without a checksum, whether there is an end."""
    try:
        if not part_files.complete(file.parent):
            return False
        for part in part_files.files_in(file.parent):
            if not _as_written(part):
                return False
        return _as_written(file) if sum_of(file).exists() else zipfile.is_zipfile(file)
    except (OSError, ValueError, IndexError):  # a checksum that is no text, say
        return False


def is_written(half: Path, processes: int) -> bool:
    """Whether all processes are done with a checkpoint that they write in parts."""
    return len(list(half.glob("*.sha256"))) == processes + 1


def _as_written(file: Path) -> bool:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sum_of(file).read_text().split()[0]


def newest_whole(folder: Path, check: bool = True) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from, and newer ones that are damaged, in `checkpoints/` of a run.

    Args:
        folder: `checkpoints/`.
        check: read them all; not in a process that will be told what another one has found.
    """
    damaged: list[Path] = []
    for place in reversed(complete(folder)):
        if not check or is_whole(place / FILE):
            return place / FILE, damaged
        damaged.append(place)
    return None, damaged


def half_written(folder: Path) -> list[Path]:
    """What a process left that ended while it was saving."""
    return sorted(folder.glob(".step-*.partial"))


def tidy(folder: Path, chosen: Path | None, damaged: list[Path]) -> None:
    """Before a run goes on: rename damaged checkpoints, remove half-written ones, point `last` at the one chosen.

    Args:
        folder: `checkpoints/` of the run.
        chosen: its file.
        damaged: the folders of those passed over.
    """
    for place in half_written(folder):
        shutil.rmtree(place, ignore_errors=True)
    for place in damaged:
        place.replace(_free(place.with_name(f"damaged-{place.name}")))
    if chosen:
        link(folder, "last", chosen.parent.name)


def _free(path: Path) -> Path:
    """The path, with a number behind it where something lies there."""
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.partition('.')[0]}.{number}")
    return path


def publish(half: Path, place: Path) -> None:
    """Give a written checkpoint its name, for good: after a power cut it is there whole, or not at all."""
    shutil.rmtree(place, ignore_errors=True)
    half.rename(place)
    to_disk(place)
    to_disk(place.parent)


def link(folder: Path, name: str, target: str) -> None:
    """Point `folder/name` at its neighbour `target`; never absent in between, and valid after the folder is moved."""
    if not (folder / name).is_symlink():
        unlink(folder, name)
    fresh = folder / f".{name}.link"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(folder / name)


def unlink(folder: Path, name: str) -> None:
    """Remove a link, or the second copy of a checkpoint that copying a folder has made of it."""
    if (folder / name).is_dir() and not (folder / name).is_symlink():
        shutil.rmtree(folder / name)
    (folder / name).unlink(missing_ok=True)


def prune(folder: Path, keep_last: int, best: Path | None) -> None:
    """Remove all but the newest checkpoints, the best, and the one that `best` points to until that is written."""
    for old in complete(folder)[:-keep_last]:
        if old != best and old.name != (folder / "best").resolve().name:
            shutil.rmtree(old, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
