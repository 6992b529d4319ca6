"""Files of rows: find them, open them, read them one row at a time in constant memory.

A broken row is handed on as an error in its place, so that the caller decides whether to stop; a file that cannot be
read at all raises. JSON is parsed row by row and never passes through a table, whose columns would give every row the
keys of all others.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litft.data import hub, jsontext
from litft.data.jsontext import array_elements, nearest, not_utf8, parse_json, snippet
from litft.data.opening import (
    BROKEN_ARCHIVE,
    FREE,
    RATIO,
    Bomb,
    Progress,
    open_bytes,
    refuse_other_kinds,
    refuse_special,
)
from litft.errors import DataError, UserError


@dataclass(slots=True)
class Row:
    """One row as it stands in its file.

    Attributes:
        file: the file, as the user named it, or the data set id.
        line: 1-based. The line on which the row starts in .jsonl and .csv; the number of the row elsewhere.
        value: what the row holds; meaningless where `error` is set.
        error: why the row cannot be read.
    """

    file: str
    line: int
    value: Any = None
    error: DataError | None = None


def read_rows(source: str, *, revision: str | None = None, progress: Progress | None = None) -> Iterator[Row]:
    """Read the rows of a file, of a folder of files, or of a Hugging Face data set.

    A path that exists is read as such: .jsonl or .ndjson (one JSON value a line), .json (an array of rows, one row, or
    one row a line), .csv, each also .gz or .zst, and .parquet; or a folder of them, searched through in sorted order,
    hidden files and other file types aside. Pipes and devices are refused, and what unpacks to over 200 times its size.
    Anything else of the form `org/name@revision:config:split[a:b]` is a data set id (see `litft.data.hub`).

    CSV cells are strings, nothing else. Parquet files and data sets are tables, which fill keys that a row lacks with
    null; so keys with a null value are dropped inside `tools` and `tool_calls`, real ones too, which cannot be told
    apart. Where they matter, use JSONL.

    Args:
        source: path of a file or folder, or data set id.
        revision: branch, tag or commit of a data set; no meaning for files.
        progress: told how many bytes were read; see `total_bytes`.

    Returns:
        An iterator over the rows, broken ones among them.

    Raises:
        UserError: at once, if there is nothing there or it cannot be read.
        DataError: while iterating, if a file breaks off (a truncated archive, an unclosed array).
    """
    files = find_files(source)
    rows = _of_files(files, progress) if files else hub.read_hub(source, revision=revision)
    return _at_least_one(rows, source)


def total_bytes(source: str) -> int | None:
    """The size of a source in bytes, to measure `progress` against; None for a data set id."""
    return sum(os.path.getsize(path) for path in find_files(source)) or None


def find_files(source: str) -> list[str]:
    """The files that a source stands for, in the order in which they are read; none for a data set id.

    Raises:
        UserError: no such path and no data set id either, an unknown file type, a folder without data or of several
            splits.
    """
    path = os.path.expanduser(source)
    types = f"{', '.join(_READERS)} (text also with .gz, .zst)"
    if os.path.isdir(path):
        return _files_of_folder(path)
    if os.path.exists(path):
        if _suffix(path) is None:
            raise UserError(f"--data {source}: unknown file type; use one of {types}")
        return [path]
    folder, name = os.path.split(path)
    is_id = _suffix(path) is None and hub.is_id(source)
    if is_id and (not os.path.isdir(folder) or re.search(r"[@:\[]", source)):
        return []
    if folder and not os.path.isdir(folder):
        raise UserError(f"--data {source}: no such file or folder: there is no folder {folder}")
    close = nearest(name, os.listdir(folder or "."))
    mend = f"; did you mean {os.path.join(folder, close)}?" if close else ""
    mend += f"\nfor the data set of that name on the hub, write {source}:train" if is_id else ""
    raise UserError(f"--data {source}: no such file or folder{mend}")


_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ["validation", "valid", "val", "dev", "eval"], "validation"
)


def _files_of_folder(folder: str) -> list[str]:
    def unreadable(exc: OSError) -> None:
        raise UserError(f"--data {exc.filename}: cannot be read: {exc.strerror}")

    found: dict[str, str] = {}
    splits, hint = set(), f"it should hold files of the types {', '.join(_READERS)}"
    for root, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in sorted(names):
            path = os.path.join(root, name)
            if name.endswith(".arrow"):
                hint = "datasets' save_to_disk wrote it: write it anew with to_parquet"
            if name.startswith((".", "_")) or not _suffix(name):
                continue
            stem = re.sub(r"(\.\w+?)(\.gz|\.zst)?$", "", path)
            if stem in found:  # the same rows in two forms, most likely
                raise UserError(
                    f"--data {folder}: {found[stem]} and {path} differ in file type only; name the files to use"
                )
            found[stem] = path
            words = re.split(r"[^a-z]", os.path.relpath(path, folder).lower())
            splits |= {_SPLITS[word] for word in words if word in _SPLITS}
    if not found:
        raise UserError(f"--data {folder}: the folder holds no data files; {hint}")
    if len(splits) > 1:  # reading on would train on the test set
        one = "name the files or the folder of one"
        raise UserError(f"--data {folder}: the folder holds several splits ({', '.join(sorted(splits))}); {one}")
    return sorted(found.values(), key=lambda path: Path(path).parts)


def _suffix(path: str) -> str | None:
    """The file type, a compression aside: ".jsonl" for x.jsonl.gz; None if it is none of ours."""
    path = path.lower()
    inner = re.sub(r"\.(gz|zst)$", "", path)
    suffix = os.path.splitext(inner)[1]
    return suffix if suffix in _READERS and (path == inner or suffix != ".parquet") else None


def _of_files(files: list[str], progress: Progress | None) -> Iterator[Row]:
    for file in files:
        last = 0
        try:
            refuse_special(file)
            for row in _READERS[_suffix(file) or ""](file, progress):
                last = row.line
                yield row
        except BROKEN_ARCHIVE as exc:
            mend = "the archive is cut off or damaged: fetch or write it again"
            mend = "if it is meant so, save its rows as plain JSONL" if isinstance(exc, Bomb) else mend
            raise DataError(f"cannot be unpacked after row {last}: {_first_line(exc)}", file=file, mend=mend) from None
        except OSError as exc:
            raise UserError(f"--data {file}: cannot be read: {exc.strerror or _first_line(exc)}") from None


def _at_least_one(rows: Iterator[Row], source: str) -> Iterator[Row]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise UserError(f"--data {source}: no rows in it: the file is empty")


def _first_line(exc: Exception) -> str:
    return snippet((str(exc).splitlines() or [type(exc).__name__])[0])


# One reader a file type: `reader(file, progress)` yields its rows.


def _row(text: bytes, file: str, line: int, first_line: int = 0) -> Row:
    text = text.rstrip(b"\r\n")
    try:
        return Row(file, line, parse_json(text, file=file, line=line, first_line=first_line))
    except DataError as error:
        return Row(file, line, error=error)


def _lines(handle: io.BufferedReader, file: str) -> Iterator[tuple[int, bytes | DataError]]:
    """The lines of a file, cut at line feeds and nowhere else, and an error for one that is too long to be a row."""
    number = 0
    while line := handle.readline(jsontext.MAX_ROW_BYTES + 1):
        number += 1
        if len(line) <= jsontext.MAX_ROW_BYTES:
            yield number, line
            continue
        start = line[:200].decode("utf-8", "replace")
        while line and not line.endswith(b"\n"):
            line = handle.readline(1 << 20)
        what = f"the line is longer than {jsontext.MAX_ROW_BYTES >> 20} MiB"
        yield number, DataError(what, file=file, line=number, mend="write one row on a line", snippet=snippet(start))


def _read_jsonl(file: str, progress: Progress | None) -> Iterator[Row]:
    with open_bytes(file, progress) as handle:
        for number, line in _lines(handle, file):
            if isinstance(line, DataError):
                yield Row(file, number, error=line)
            elif line.strip():
                row = _row(line, file, number)
                if row.error and number == 1 and line.strip() == b"[":
                    raise UserError(f"--data {file}: this is a JSON array, not one row a line; name the file .json")
                yield row


def _read_json(file: str, progress: Progress | None) -> Iterator[Row]:
    with open_bytes(file, progress) as handle:
        line, first = 1, b""
        while not first and (ahead := handle.peek()):
            first = ahead.lstrip()[:1]
            blanks = ahead[: ahead.find(first)] if first else ahead
            line += blanks.count(b"\n")
            handle.read(len(blanks))
        if first == b"[":
            handle.read(1)
            number = 0
            try:
                for number, (text, first_line) in enumerate(array_elements(handle, line), start=1):
                    yield _row(text, file, number, first_line)
            except DataError as error:
                raise DataError(
                    error.what, file=file, line=number + 1, mend=error.mend, snippet=error.snippet
                ) from None
            return
        head = handle.readline(jsontext.MAX_ROW_BYTES + 1)
        whole = _row(head, file, 1, line)
        if whole.error:  # one object over many lines, unless another row stands on the next
            rest = handle.read(jsontext.MAX_ROW_BYTES)
            whole = _row(head + rest, file, 1, line)
            if whole.error is None or _row(rest.lstrip().partition(b"\n")[0], file, 1).error:
                if first:
                    yield whole
                return
    yield from _read_jsonl(file, progress)  # one row a line, under the name of the array


def _read_csv(file: str, progress: Progress | None) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), jsontext.MAX_ROW_BYTES))
    line = 0  # the last one read: a quoted cell may span several

    def decoded(numbered: tuple[int, bytes | DataError]) -> str:
        nonlocal line
        line, raw = numbered
        if isinstance(raw, DataError):
            raise raw
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise not_utf8(exc, file=file, line=line) from None

    with open_bytes(file, progress) as handle:
        reader = csv.reader(map(decoded, _lines(handle, file)), strict=True)
        header: list[str] | None = None
        while True:
            start = line + 1
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    continue
                if header is None:
                    header = _header(cells, file)
                elif len(cells) != len(header):
                    what = f"{len(cells)} cells, but the header has {len(header)}"
                    mend = "a cell that holds a comma or a line break stands in double quotes"
                    raise DataError(what, file=file, line=start, mend=mend, snippet=snippet(",".join(cells)))
                else:
                    yield Row(file, start, dict(zip(header, cells, strict=True)))
            except csv.Error as exc:
                mend = 'write a quote inside a cell twice ("") and close the cell'
                yield Row(file, start, error=DataError(f"broken CSV: {exc}", file=file, line=start, mend=mend))
            except DataError as error:
                yield Row(file, start, error=error)


def _header(cells: list[str], file: str) -> list[str]:
    names = [name.strip() for name in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--data {file}: the header names a column twice: {snippet(', '.join(twice))}")
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise UserError(f"--data {file}: the cells are not separated by commas: {snippet(names[0])}")
    return names


def _read_parquet(file: str, progress: Progress | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, number = os.path.getsize(file), 0
    if not size:
        return
    with open(file, "rb") as handle:
        refuse_other_kinds(file, handle.read(512))
    try:
        with pq.ParquetFile(file, memory_map=True) as table:
            groups = map(table.metadata.row_group, range(table.num_row_groups))
            if sum(group.total_byte_size for group in groups) > FREE + RATIO * size:
                raise Bomb
            for batch in table.iter_batches(batch_size=16):  # few: one cell may be as large as the file
                for value in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield Row(file, number, without_filled_nulls(value))
                if progress:
                    rows = table.metadata.num_rows
                    progress(size * number // rows - size * (number - len(batch)) // rows)
    except (pa.ArrowException, OSError, KeyError, ValueError) as exc:
        if isinstance(exc, OSError) and exc.errno:
            raise
        what = f"cannot be read as Parquet after row {number}: {_first_line(exc)}"
        raise DataError(what, file=file, mend="fetch or write the file again") from None


def without_filled_nulls(value: Any, inside: bool = False) -> Any:
    """Drop the keys with a null value inside `tools` and tool calls: a table puts them there for keys of other rows."""
    if isinstance(value, dict):
        return {
            key: without_filled_nulls(item, inside or key in ("tools", "tool_calls", "functions", "function_call"))
            for key, item in value.items()
            if not (inside and item is None)
        }
    if isinstance(value, list):
        return [without_filled_nulls(item, inside) for item in value]
    return value


_READERS: dict[str, Callable[[str, Progress | None], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def named_files(val: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    """Validation files by the name that their loss gets: `val`, or the stems of several files."""
    if val is None:
        return {}
    if isinstance(val, dict):
        return val
    files = [val] if isinstance(val, str) else val
    if len(files) == 1:
        return {"val": files[0]}
    names = [Path(file).stem for file in files]
    return {
        name if names.count(name) == 1 else f"{name}-{i}": f
        for i, (name, f) in enumerate(zip(names, files, strict=True))
    }
