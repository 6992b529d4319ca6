"""Token ids and masks of a data file, encoded once and kept on disk, memory-mapped.

The cache is keyed by a content hash of everything that decides the ids: the bytes of the data, the tokenizer, its chat
template, the mask policy and this package's own data code. Length limits are applied when rows are read, so they are
not part of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litft.errors import DataError, UserError

LISTED = 1000  # skipped rows that are listed by name; all are counted
CHUNK = 128  # rows handed to a worker process at a time
ROWS_AT_ONCE = 4096  # whose masks are counted in one go: the whole file's would be 8 bytes a token
PARALLEL_FROM = 4_000_000  # bytes of data from which worker processes earn their start-up


@dataclass
class TokenStore:
    """The encoded rows of one data file; a row is one document, or several that belong together (a pair of answers).

    Attributes:
        ids: token ids of all documents end to end, int32 [tokens].
        trained: which of them are trained, bool [tokens]; never the first of a document.
        offsets: where each document begins and the last ends, int64 [documents + 1].
        lines: 1-based line or row number in the file, int64 [rows].
        prompts: hash of what precedes the first answer, uint64 [rows]; equal prompts have equal hashes.
        values: a number that a row brings, fp32 [rows]: the label of an answer, the margin of a pair; else 0.
        schemas: how many rows of each form were read.
        skipped: the messages of rows left out as bad, at most `LISTED`.
        bad: how many were left out.
        notes: in how many rows the chat template left something out by its own rules, by what.
        file: where the rows came from.
        digest: hash of all ids, masks and numbers.
        documents: in a row.
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    prompts: np.ndarray
    values: np.ndarray
    file: str
    schemas: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    bad: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    documents: int = 1

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def document(self, index: int, max_length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of a document, cut at `max_length`."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        end = min(end, start + max_length) if max_length else end
        return self.ids[start:end], self.trained[start:end]

    def trained_counts(self, max_length: int | None = None) -> np.ndarray:
        """Trained tokens of each document, of its first `max_length` tokens."""
        counts = np.empty(len(self.offsets) - 1, np.int64)
        for first in range(0, len(counts), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            starts, ends = self.offsets[:-1][some], self.offsets[1:][some]
            total = np.concatenate([[0], np.cumsum(self.trained[starts[0] : ends[-1]], dtype=np.int64)])
            cut = ends if max_length is None else np.minimum(ends, starts + max_length)
            counts[some] = total[cut - starts[0]] - total[starts - starts[0]]
        return counts


class Damaged(UserError):
    """What lies in the cache is no store."""

    def __init__(self, folder: Path, why: object) -> None:
        reason = (str(why).splitlines() or ["?"])[0][:120]
        super().__init__(f"the token cache {folder} is damaged ({reason}); mend: remove that folder")


def open_store(folder: Path, file: str) -> TokenStore:
    """Map a store that `encode_file` has written; `file` is where the same rows lie now, under whatever name.

    Raises:
        Damaged: it is cut short, say, or was tampered with; nothing that could run is unpickled.
    """
    kinds: dict[str, Any] = {"ids": np.int32, "trained": np.bool_, "offsets": np.int64, "lines": np.int64}
    kinds |= {"prompts": np.uint64, "values": np.float32}
    mapped = ("ids", "trained")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r" if name in mapped else None, allow_pickle=False)
            for name in kinds
        }
        store = TokenStore(**arrays, **meta, file=file)
        rows, count, documents = len(store), len(store.ids), len(store) * int(store.documents)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise Damaged(folder, error) from None
    sizes = {"ids": count, "trained": count, "offsets": documents + 1, "lines": rows, "prompts": rows, "values": rows}
    for name, array in arrays.items():
        if array.dtype != kinds[name] or array.shape != (sizes[name],):
            raise Damaged(folder, f"{name}.npy is of another form")
    if store.offsets[0] != 0 or store.offsets[-1] != count or (store.lengths < 0).any():
        raise Damaged(folder, "its parts do not fit together")
    return store


def encode_file(
    rows: Callable[[], Iterable[Any]],
    encode: Callable[[Any], tuple[Any, ...]],
    folder: Path,
    *,
    file: str,
    skip_bad: bool,
    workers: int = 1,
    progress: Callable[[int], None] = lambda rows: None,
) -> TokenStore:
    """Encode a file's rows into a store, or open the one that is there.

    Args:
        rows: gives the rows afresh.
        encode: a row to its schema name, its `Encoded` (or several, equally many for each row) and, where the rows may
            be split, what precedes the first answer as text, and the row's number; raises `DataError` for a bad row.
            Picklable.
        folder: where the store lies or shall lie; complete or absent, two processes may write it at once.
        file: name of the data for messages.
        skip_bad: leave bad rows out, counted, instead of raising.
        workers: processes that encode.
        progress: called with the number of rows done.

    Raises:
        DataError: for the first bad row, unless `skip_bad`.
        UserError: a worker process was killed.
    """
    if (folder / "meta.json").exists():
        try:
            return open_store(folder, file)
        except Damaged as error:
            print(f"{str(error).partition(';')[0]}; encoding {file} anew", file=sys.stderr)
            shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    work.mkdir()
    try:
        _write(work, _results(rows(), encode, workers), skip_bad, progress)
        with contextlib.suppress(OSError):  # another process was first: its store is the same
            work.rename(folder)
        return open_store(folder, file)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(work: Path, results: Iterator[Any], skip_bad: bool, progress: Callable[[int], None]) -> None:
    offsets, each = [0], 1
    lines: list[int] = []
    prompts: list[int] = []
    values: list[float] = []
    schemas: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    skipped: list[str] = []
    bad = 0
    digest = hashlib.sha256()
    with _Growing(work / "ids.npy", np.int32) as ids_out, _Growing(work / "trained.npy", np.bool_) as trained_out:
        for done, result in enumerate(results, 1):
            progress(done)
            if isinstance(result, DataError):
                if not skip_bad:
                    raise result
                bad += 1
                if len(skipped) < LISTED:
                    skipped.append(str(result).partition("\n")[0])
                continue
            schema, line, documents, prompt, value, said = result
            schemas[schema] += 1
            notes.update(said)
            for ids, trained in documents:
                ids_out.append(ids)
                trained_out.append(trained)
                offsets.append(offsets[-1] + len(ids))
                digest.update(ids.tobytes() + trained.tobytes())
            if lines and each != len(documents):
                raise DataError("pairs and other rows in one file", line=line, mend="put them into files of their own")
            each = len(documents)
            lines.append(line)
            prompts.append(prompt)
            values.append(value)
    digest.update(np.array(values, np.float32).tobytes() if any(values) else b"")
    np.save(work / "offsets.npy", np.array(offsets, np.int64))
    np.save(work / "lines.npy", np.array(lines, np.int64))
    np.save(work / "prompts.npy", np.array(prompts, np.uint64))
    np.save(work / "values.npy", np.array(values, np.float32))
    counts = {"schemas": dict(schemas), "skipped": skipped, "bad": bad, "notes": dict(notes)}
    meta = counts | {"digest": digest.hexdigest(), "documents": each}
    (work / "meta.json").write_text(json.dumps(meta))


class _Growing:
    """A one-dimensional .npy file written piece by piece; its header is filled in at the end."""

    HEADER = 128

    def __init__(self, path: Path, dtype: Any) -> None:
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0

    def __enter__(self) -> _Growing:
        self.out = open(self.path, "wb")
        self.out.write(b"\0" * self.HEADER)
        return self

    def append(self, values: np.ndarray) -> None:
        self.out.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.count += len(values)

    def __exit__(self, *_: object) -> None:
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({self.count},), }}"
        body = text.ljust(self.HEADER - 11) + "\n"
        self.out.seek(0)
        self.out.write(b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body.encode())
        self.out.close()


def _results(rows: Iterable[Any], encode: Callable[[Any], tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Each row's `(schema, line, documents, hash of the prompt, number, notes)` or its DataError, in order."""
    if workers <= 1:
        for row in rows:
            yield _encode_one(encode, row)
        return
    import multiprocessing
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # fork, so that a user's script needs no `if __name__ == "__main__"`; the children only run the tokenizer
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=_remember, initargs=(encode,))
    pending: deque[Future[list[Any]]] = deque()  # bounded, so that a large file isn't held in memory
    try:
        for chunk in _chunks(rows):
            pending.append(pool.submit(_encode_chunk, chunk))
            if len(pending) >= 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("encoding: a worker process was killed, most often for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODE: Callable[[Any], tuple[Any, ...]] | None = None


def _remember(encode: Callable[[Any], tuple[Any, ...]]) -> None:
    global _ENCODE
    _ENCODE = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer


def _encode_chunk(rows: list[Any]) -> list[Any]:
    assert _ENCODE is not None
    return [_encode_one(_ENCODE, row) for row in rows]


def _encode_one(encode: Callable[[Any], tuple[Any, ...]], row: Any) -> Any:
    try:
        schema, encoded, *more = encode(row)
    except DataError as error:
        return error
    several = encoded if isinstance(encoded, list) else [encoded]
    documents = []
    for one in several:
        trained = np.array(one.trained, np.bool_)
        trained[:1] = False  # nothing precedes a document's first token, so nothing predicts it
        documents.append((np.array(one.ids, np.int32), trained))
    content = more[0].encode("utf-8", "surrogatepass") if more else documents[0][0].tobytes()
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
    notes = dict.fromkeys(note for one in several for note in one.notes)
    return schema, row.line, documents, key, more[1] if len(more) > 1 else 0.0, tuple(notes)


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def content_hash(source: str) -> str:
    """Hash of a data file's bytes and kind, or of every file of a folder with its name."""
    path = Path(source)
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in filter(Path.is_file, files):  # a pipe would be waited for; reading the rows refuses it
        digest.update((file.name if path.is_dir() else "".join(path.suffixes)).encode())
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def code_hash() -> str:
    """Hash of this package's data code: another version may give other ids."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def cache_key(*parts: object) -> str:
    """Short content hash of whatever decides the ids."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
