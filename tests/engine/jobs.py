"""What the processes of the fault tests do; each is called in a fresh one by `zygote.py`."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401 - imported ahead, as all below
import lightning.pytorch  # noqa: F401
import torch
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import litft.cli.finetune
import litft.engine.run
import litft.methods.sft  # noqa: F401
from litft.cli.main import main


def command(words: list[str], folder: str, threads: int = 1, environment: dict[str, str] | None = None) -> int:
    """`litft WORDS`, in a folder."""
    os.environ.update(environment or {})
    torch.set_num_threads(threads)
    os.chdir(folder)
    return main(words)


def on_a_small_disk(words: list[str], folder: str, disk: str, size: str, ballast: int, keep: str) -> int:
    """A command whose run folder lies on a disk too small for it; then room is made, and it is resumed.

    Args:
        words: of the command; its --out is below `disk`.
        folder: to be in.
        disk: where a tmpfs of `size` is mounted, which only this process sees.
        size: as mount takes it.
        ballast: bytes that are taken until the command is resumed.
        keep: where the disk's content is copied to in the end.

    Returns:
        100 where nothing can be mounted; else ten times the first exit code, and the second.
    """
    if not _mount(disk, size):
        return 100
    taken = Path(disk) / "ballast"
    taken.write_bytes(bytes(ballast))
    first = command(words, folder)
    print(f"-- first command: {first}", flush=True)
    taken.unlink()
    second = command([*words, "--resume"], folder)
    shutil.copytree(disk, keep, symlinks=True)
    return 10 * first + second


def read_only(words: list[str], folder: str, disk: str) -> int:
    """A command whose --out lies on a disk that can only be read; 100 where nothing can be mounted."""
    return command(words, folder) if _mount(disk, "1m", read_only=True) else 100


def _mount(path: str, size: str, read_only: bool = False) -> bool:
    """Mount a tmpfs for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    new_user, new_mounts, only_read = 0x10000000, 0x00020000, 1
    if libc.unshare(new_user | new_mounts):
        return False
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    options = ctypes.c_char_p(f"size={size}".encode())
    done = libc.mount(b"none", path.encode(), b"tmpfs", ctypes.c_ulong(only_read if read_only else 0), options)
    return done == 0 or ctypes.get_errno() == errno.EBUSY


def full_after(words: list[str], folder: str, allowed: int) -> int:
    """A command in which checkpoints beyond the first `allowed` can't be written: no file may be so large."""
    from litft.engine import background

    write, count = background._File.write, [0]

    def limited(self: Any, data: Any) -> int:
        if self.tell() == 0:
            count[0] += 1
        if count[0] > allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    background._File.write = limited  # type: ignore[method-assign]
    return command(words, folder)
