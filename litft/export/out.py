"""Where an export may be written."""

from __future__ import annotations

import os
from pathlib import Path

from litft.errors import UserError
from litft.models.resolve import ModelSource


def new_output(out: str | Path, source: ModelSource) -> Path:
    """A folder that can be written: it isn't there yet, or is empty; never in or around the source's folders.

    Args:
        out: as the user named it.
        source: what is exported.

    Returns:
        `out`, absolute. Nothing is made.

    Raises:
        UserError: something is there, it is the source's, or the place can't be written to.
    """
    path = Path(out).expanduser().absolute()
    if path.is_symlink():  # a folder takes the place of what the link leads to, not of the link
        path = path.resolve()
    for folder in filter(None, (source.folder, source.adapter)):
        mine = folder.resolve()
        if path.resolve() == mine or mine in path.resolve().parents:
            raise UserError(f"--out {out}: lies in {folder}, which is only read\nmend: name another folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--out {out}: is there already and not empty\nmend: name another folder, or delete it")
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {out}: is a file\nmend: name a folder")
    above = path.parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {out}: {above} cannot be written to\nmend: name another folder")
    return path
