"""Who may read the files that leave: the user's umask says it."""

from __future__ import annotations

from pathlib import Path


def follow_umask(folder: Path) -> None:
    """Give the files in a folder that was just made the permissions that the umask gave the folder.

    safetensors writes through a temporary file, which nobody but its owner may read, and leaves it so.
    """
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
