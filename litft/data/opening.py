"""Open a text file for reading bytes: unpacked, counted, behind the byte order mark, and nothing but a text file."""

from __future__ import annotations

import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from litft.errors import UserError

Progress = Callable[[int], None]
"""Called with the bytes of a file read since the last call (compressed bytes where the file is compressed)."""

FREE, RATIO = 64 << 20, 200
"""A compressed file may unpack to this many bytes, and to this many times what has been read of it. Chats come to 3 to
20 times; a file made to fill the memory or the time, to a thousand times and more."""


class _Counted(io.FileIO):
    """A file that tells `progress` what is read of it."""

    def __init__(self, path: str, progress: Progress | None) -> None:
        super().__init__(path)
        self._progress = progress

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        if self._progress and count:
            self._progress(count)
        return count


class ZstdBroken(Exception):
    """A .zst file that is damaged or cut off."""


class Bomb(Exception):
    """A small file that unpacks to a huge one."""

    def __init__(self) -> None:
        super().__init__(f"it is over {RATIO} times as large as its file, as chats never are")


BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile, ZstdBroken, Bomb)
"""What reading a damaged compressed file raises."""


class _Zstd(io.RawIOBase):
    """The text of a .zst file. zstandard's own reader takes a truncated file for a complete one; this one does not."""

    _PIECE = 1 << 10  # zstandard unpacks what it is given in one go, and four bytes can stand for 128 KiB

    def __init__(self, file: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(".zst files need the package zstandard: pip install zstandard") from None
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file, self._frame, self._error = file, self._new(), zstandard.ZstdError
        self._started, self._ready = False, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._file.read(self._PIECE)
            if not packed:
                if self._started and not self._frame.eof:
                    raise ZstdBroken("the file ends inside a frame")
                return 0
            if self._frame.eof:  # another frame follows
                self._frame = self._new()
            try:
                self._ready, self._started = memoryview(self._frame.decompress(packed)), True
            except self._error as exc:
                raise ZstdBroken(str(exc)) from None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Bounded(io.RawIOBase):
    """An unpacked file that stops where it grows out of all proportion to what has been read of the packed one."""

    def __init__(self, unpacked: Any, packed: io.FileIO) -> None:
        self._unpacked, self._packed, self._total = unpacked, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._unpacked.readinto(buffer)
        self._total += count
        if self._total > FREE + RATIO * self._packed.tell():
            raise Bomb
        return count

    def close(self) -> None:
        self._unpacked.close()
        super().close()


@contextmanager
def open_bytes(path: str, progress: Progress | None) -> Iterator[io.BufferedReader]:
    """Open for reading bytes, unpacked, behind the byte order mark.

    Args:
        path: a text file, compressed if it is named .gz or .zst.
        progress: told how many bytes were read.

    Raises:
        UserError: the text is UTF-16, or it is no text.
    """
    with _Counted(path, progress) as file:
        packed: Any = io.BufferedReader(file, 1 << 20)
        refuse_other_kinds(path, packed.peek(_HEAD)[:_HEAD])
        text = packed
        if path.lower().endswith(".gz"):
            text = io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=packed), file), 1 << 20)
        elif path.lower().endswith(".zst"):
            text = io.BufferedReader(_Bounded(_Zstd(packed), file), 1 << 20)
        with text as handle:
            head = handle.peek(_HEAD)[:_HEAD]
            if text is not packed:
                refuse_other_kinds(path, head, unpacked=True)
            if head.startswith((b"\xff\xfe", b"\xfe\xff")) or _WIDE.match(head):
                raise UserError(f"--data {path}: the text is UTF-16; save it as UTF-8")
            if head.startswith(b"\xef\xbb\xbf"):
                handle.read(3)
            yield handle


_HEAD = 512
_WIDE = re.compile(rb"(?:[^\0]\0){4}|(?:\0[^\0]){4}")  # every other byte is zero
_KINDS = (  # what begins with these bytes at this place, and the ending that it should have
    ("gzip", 0, b"\x1f\x8b", ".gz"),
    ("zstd", 0, b"\x28\xb5\x2f\xfd", ".zst"),
    ("Parquet", 0, b"PAR1\x15", ".parquet"),
    ("a zip archive", 0, b"PK\x03\x04", ""),
    ("a tar archive", 257, b"ustar", ""),
    ("bzip2", 0, b"BZh", ""),
    ("xz", 0, b"\xfd7zXZ\0", ""),
    ("7z", 0, b"7z\xbc\xaf\x27\x1c", ""),
    ("an Arrow file", 0, b"ARROW1\0", ""),
    ("an SQLite database", 0, b"SQLite format 3\0", ""),
)


def refuse_other_kinds(path: str, head: bytes, unpacked: bool = False) -> None:
    """Raise where a file is none of the kind that its name says: better said once than of every line.

    Args:
        path: its name.
        head: its first bytes.
        unpacked: they are those of the text in a compressed file.

    Raises:
        UserError: it is a known kind of other file.
    """
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"--data {path}: this is a Git LFS pointer, not the data; fetch that with git lfs pull")
    for what, at, magic, ending in _KINDS:
        if not head.startswith(magic, at) or (not unpacked and ending and path.lower().endswith(ending)):
            continue
        mend = f"let its name end in {ending}" if ending and not unpacked else "save the rows in it as JSONL"
        raise UserError(f"--data {path}: {'in it is' if unpacked else 'this is'} {what}, not text; {mend}")


def refuse_special(path: str) -> None:
    """Raise for a pipe or a device, which is read only once, or never ends; the rows are read several times.

    Raises:
        UserError: it is one.
        OSError: there is nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"--data {path}: this is a pipe or a device, not a file; save the rows in a file first")
