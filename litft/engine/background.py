"""Checkpoints written while training goes on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from litft.engine import checkpoint_files as files
from litft.engine import part_files
from litft.engine.room import host_memory_left

PLAIN = (int, float, bool, str, type(None))
LEAD_S = 0.05  # that the step after has, to be under way
SPARE = 2  # a copy is taken where so many times its size is free


class Left(Exception):
    """A checkpoint was written by one process alone."""


class Background(TorchCheckpointIO):
    """Writes a checkpoint in a thread, from a copy of its tensors in the host's memory; one at a time.

    Training waits for the copy only. Where memory is short there is none, and it waits for the disk. Nothing is raised
    where a checkpoint can't be written, which other processes wouldn't know of: `wait` tells.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: tuple[Path, Exception] | None = None
        self.pending: functools.partial[None] | None = None
        """What is to follow once all processes have written their parts."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begin to write; the one before is waited for.

        Args:
            checkpoint: of the Trainer.
            path: of the file; its folder is made.
            storage_options: `then`, what to call after the file is on the disk; `now`, to wait for that; `leave`, to
                raise `Left` at the end. Without `then` it is written as Lightning writes. Where each process writes a
                part: `parts` and the name of their `file`; `then` is left in `pending`, and only the first process, of
                which `alone` is true, writes the checkpoint itself.

        Raises:
            Left: asked for by `leave`: the way out of `Trainer.save_checkpoint` without meeting other processes.
        """
        options = storage_options or {}
        if "then" not in options:  # somebody else's, who counts on its being there
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        then, path, parts = options["then"], Path(path), options.get("parts")
        self._join()
        content: dict[str, Any] = {} if parts is None else {options["file"]: parts}
        if parts is None or options["alone"]:
            content[path.name] = checkpoint
        if parts is not None:
            then, self.pending = None, then
        if options.get("now") or host_memory_left() < SPARE * size_of(content):
            self._try(content, path, then)
        else:
            copy = to_host(content)
            self._thread = threading.Thread(target=self._try, args=(copy, path, then), name="checkpoint")
            self._thread.start()
        if options.get("leave"):
            raise Left

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """A checkpoint with whole tensors, whoever wrote it."""
        return load(Path(path), whole=True)

    @property
    def busy(self) -> bool:
        """Whether something is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> tuple[Path, Exception] | None:
        """Return once nothing is being written; the file that the last one should have become, and why it didn't."""
        self._join()
        error, self._error = self._error, None
        return error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _try(self, content: dict[str, Any], path: Path, then: Callable[[], None] | None) -> None:
        try:
            _write(content, path, then)
        except Exception as error:
            self._error = path, error


def _write(content: dict[str, Any], path: Path, then: Callable[[], None] | None) -> None:
    _give_way()
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for name, value in content.items():
            _write_file(path.with_name(name), value, as_parts=name != path.name)
    except BaseException:
        for name in content:  # the room they take may be what the rest of the run lacks
            for written in (path.with_name(name), files.sum_of(path.with_name(name))):
                written.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # another process's part is there
                path.parent.rmdir()
        raise
    if then:
        then()


def _write_file(path: Path, value: Any, as_parts: bool) -> None:
    with _File(io.FileIO(path, "w")) as file:
        try:
            with _no_sums_inside():
                part_files.write(file, value) if as_parts else torch.save(value, file)
        except RuntimeError:
            if file.error is None:
                raise
            raise file.error from None
        file.flush()
        os.fsync(file.fileno())
    check = files.sum_of(path)
    check.write_text(f"{file.digest.hexdigest()}  {path.name}\n")
    files.to_disk(check)


def load(path: Path, whole: bool = False) -> dict[str, Any]:
    """Read a checkpoint, whoever wrote it.

    Args:
        path: of its file.
        whole: read all tensors; else those of parts' files are `part_files.Saved`, and the others mapped into memory.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
    if "parts" in checkpoint:
        part_files.put_back(checkpoint, path.parent, whole)
    return checkpoint


def _give_way() -> None:
    """Let training go first, where this is a thread beside it: pickling holds the interpreter, summing a processor."""
    if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
        time.sleep(LEAD_S)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


@contextlib.contextmanager
def _no_sums_inside() -> Iterator[None]:
    """The checksum is made of the whole file; torch's own, of each tensor, takes as long again as all the rest."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _File(io.BufferedWriter):
    """Makes the checksum on the way, and keeps why it could not write: torch says "unexpected pos" of a full disk."""

    error: OSError | None = None

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self.digest.update(data)
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def to_host(value: Any, seen: dict[int, Tensor] | None = None) -> Any:
    """A copy of nested containers with all tensors in the host's memory; tensors met twice stay one."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value.detach().to("cpu", copy=True)
        return seen[id(value)]
    if isinstance(value, dict):
        return {key: inner if type(inner) in PLAIN else to_host(inner, seen) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        copy = [inner if type(inner) in PLAIN else to_host(inner, seen) for inner in value]
        return tuple(copy) if isinstance(value, tuple) else copy
    return value


def size_of(value: Any) -> int:
    """Bytes of the tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(size_of, value)) if isinstance(value, (list, tuple)) else 0
