"""Open a text file for reading bytes: unpacked, counted, behind the byte order mark."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from litft.errors import UserError

Progress = Callable[[int], None]
"""Called with the bytes of a file read since the last call (compressed bytes where the file is compressed)."""


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


BROKEN_ARCHIVE = (EOFError, zlib.error, gzip.BadGzipFile, ZstdBroken)
"""What reading a damaged compressed file raises."""


class _Zstd(io.RawIOBase):
    """The text of a .zst file. zstandard's own reader takes a truncated file for a complete one; this one does not."""

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
            packed = packed or self._file.read(1 << 16)
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


@contextmanager
def open_bytes(path: str, progress: Progress | None) -> Iterator[io.BufferedReader]:
    """Open for reading bytes, unpacked, behind the byte order mark.

    Args:
        path: a text file, compressed if it is named .gz or .zst.
        progress: told how many bytes were read.

    Raises:
        UserError: the text is UTF-16.
    """
    with _Counted(path, progress) as file:
        raw: Any = file
        if path.lower().endswith(".gz"):
            raw = gzip.GzipFile(fileobj=io.BufferedReader(file))
        elif path.lower().endswith(".zst"):
            raw = _Zstd(io.BufferedReader(file))
        with io.BufferedReader(raw, 1 << 20) as handle:
            head = handle.peek(4)[:4]
            if head.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise UserError(f"--data {path}: the text is UTF-16; save it as UTF-8")
            if head.startswith(b"\xef\xbb\xbf"):
                handle.read(3)
            yield handle
