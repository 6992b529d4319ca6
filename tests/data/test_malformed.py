"""Files that are not what they should be: each kind, what is said of it, and that nothing else ever happens."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from litft.data.rows import check
from litft.errors import UserError

GOOD = b'{"text": "good"}\n'
MESSAGES = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
LONG = b'{"text": "' + b"good " * 1000 + b'"}\n'
Make = Callable[[Path], object]


def zst(data: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level).compress(data)


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("../escaped.jsonl")
        entry.size = len(GOOD)
        archive.addfile(entry, io.BytesIO(GOOD))
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../escaped.jsonl", GOOD)
    return out.getvalue()


def parquet(table: dict | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(table or {"text": ["a", "b"] * 50}), out, **options)
    return out.getvalue()


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with other bytes at a place; a negative one counts from the end."""
    at %= len(data)
    return data[:at] + new + data[at + len(new) :]


def sqlite(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table rows (text)")


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(300 << 20)


def folder(**files: bytes) -> Make:
    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name.replace("_", ".")).write_bytes(content)

    return make


EMPTY = "--data F: no rows in it: the file is empty$"
WIDE = "--data F: the text is UTF-16; save it as UTF-8$"
CUT = "; the archive is cut off or damaged: fetch or write it again$"
PARQUET = "F: cannot be read as Parquet after row 0: .*; fetch or write the file again$"
BOMB = "F: cannot be unpacked after row .*: it is over 200 times as large as its file, .*; if it is meant so, save "
HALF = "write the whole character; half of it is not text$"
SPECIAL = "--data F: this is a pipe or a device, not a file; save the rows in a file first$"

# kind, name of the file, its content or what makes it, what is said first of it (F: its path)
TABLE: list[tuple[str, str, bytes | Make, str]] = [
    ("empty", "a.jsonl", b"", EMPTY),
    ("empty", "blank.jsonl", b" \r\n\t\n", EMPTY),
    ("empty", "bom.jsonl", b"\xef\xbb\xbf", EMPTY),
    ("empty", "array.json", b"[ ]", EMPTY),
    ("empty", "header.csv", b"prompt,completion\n", EMPTY),
    ("empty", "none.parquet", b"", EMPTY),
    ("empty", "no-rows.parquet", parquet({"text": pa.array([], pa.string())}), EMPTY),
    ("empty", "nothing.jsonl.gz", gzip.compress(b""), EMPTY),
    ("empty", "nothing.jsonl.zst", zst(b""), EMPTY),
    ("UTF-16", "bom-le.jsonl", GOOD.decode().encode("utf-16"), WIDE),
    ("UTF-16", "bom-be.csv", b"\xfe\xff" + "text\na".encode("utf-16-be"), WIDE),
    ("UTF-16", "little.jsonl", GOOD.decode().encode("utf-16-le"), WIDE),
    ("UTF-16", "big.json", GOOD.decode().encode("utf-16-be"), WIDE),
    ("UTF-16", "packed.jsonl.gz", gzip.compress(GOOD.decode().encode("utf-16")), WIDE),
    ("UTF-16", "utf-32.jsonl", GOOD.decode().encode("utf-32"), WIDE),
    ("not UTF-8", "latin.jsonl", GOOD + b'{"text": "caf\xe9"}', r"F:2: not UTF-8 at byte 14 of the row; save the"),
    ("not UTF-8", "overlong.jsonl", b'{"text": "\xc0\xaf"}', r"F:1: not UTF-8 at byte 11 of the row"),
    ("not UTF-8", "raw-surrogate.jsonl", b'{"text": "\xed\xa0\x80"}', r"F:1: not UTF-8 at byte 11 of the row"),
    ("not UTF-8", "cut-inside.jsonl", GOOD + "\u6f22".encode()[:2], r"F:2: not UTF-8 at byte 1 of the row"),
    ("not UTF-8", "header.csv", b"te\xe9xt\na\n", r"F:1: not UTF-8 at byte 3 of the row"),
    ("surrogate", "high.jsonl", GOOD + rb'{"text": "\ud800"}', f"F:2: lone surrogate in text; {HALF}"),
    ("surrogate", "low.jsonl", MESSAGES.replace(b'"a"', rb'"\udc00"'), f"F:1: lone surrogate in the content .*{HALF}"),
    ("surrogate", "swapped.json", rb'[{"text": "\ude00\ud83d"}]', f"F:1: lone surrogate in text; {HALF}"),
    ("NUL", "zeros.jsonl", b"\0" * 1000, r"F:1: broken JSON at column 1: "),
    ("NUL", "raw.jsonl", b'{"text": "a\0b"}', r"F:1: broken JSON at column 12: invalid control character; "),
    ("NUL", "hole.jsonl", GOOD + b"\0" * 4096 + b"\n" + GOOD, r"F:2: broken JSON at column 1: "),
    ("NUL", "zeros.json", b"\0" * 9, r"F:1: broken JSON at line 1 of the file, column 1: "),
    ("syntax", "comma.jsonl", b'{"text": "a",}', r"F:1: broken JSON at column 1.: .*; remove the last comma$"),
    ("syntax", "single.jsonl", b"{'text': 'a'}", r"F:1: broken JSON at column 2: .*; strings take double quotes in"),
    ("syntax", "python.jsonl", b'{"text": None}', r"F:1: broken JSON at column 10: .*; write true, false or null$"),
    ("syntax", "cut.jsonl", GOOD + b'{"text": "go', r"F:2: broken JSON at column 10: unterminated string; close the"),
    ("syntax", "tab.jsonl", b'{"text": "a\tb"}', r"F:1: broken JSON at column 12: invalid control character; write a"),
    ("syntax", "path.jsonl", rb'{"text": "C:\d"}', r"F:1: broken JSON at column 13: invalid \\escape; write a"),
    ("syntax", "unquoted.jsonl", b"{text: 1}", r"F:1: broken JSON at column 2: .*; write one whole JSON value$"),
    ("syntax", "inch.jsonl", b'{"text": "5" disk"}', r"F:1: broken JSON at column 14: .* a quote inside a string is"),
    ("strict", "nan.jsonl", b'{"text": "a", "score": NaN}', r"F:1: NaN is not JSON; write null, or quote it$"),
    ("strict", "infinity.json", b'[{"text": "a", "n": -Infinity}]', r"F:1: -Infinity is not JSON; "),
    ("strict", "huge.jsonl", b'{"n": 1e999}', r"F:1: number out of range; write a smaller number or a string$"),
    ("strict", "digits.jsonl", b'{"n": ' + b"9" * 5000 + b"}", r"F:1: a number has too many digits; "),
    ("strict", "twice.jsonl", b'{"text": "a", "text": "b"}', r'F:1: key "text" stands twice in one object; keep one'),
    ("nesting", "lists.jsonl", b'{"messages": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", r"F:1: JSON nested too deeply;"),
    ("nesting", "objects.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5, r"F:1: JSON nested too deeply; flatten the"),
    ("nesting", "open.json", b"[" * 10**5, r"F:1: the array is not closed; its last element starts on line 1"),
    ("nesting", "string.jsonl", json.dumps({"messages": "[" * 10**5}).encode(), r"F:1: messages: JSON nested too"),
    ("lines", "two.jsonl", GOOD.strip() * 2, r"F:1: broken JSON at column 17: extra data; write one JSON value on a"),
    ("lines", "mac.jsonl", GOOD.strip() + b"\r" + GOOD, r"F:1: broken JSON at column 18: extra data"),
    ("lines", "pretty.jsonl", b'{\n "text": "a"\n}\n', r"F:1: broken JSON at column 2: .*; the text ends too early"),
    ("lines", "array.jsonl", b"[\n" + GOOD + b"]", r"--data F: this is a JSON array, not one row a line; name the"),
    ("lines", "sse.jsonl", b"data: " + GOOD, r"F:1: broken JSON at column 1: "),
    ("array", "open.json", b"[" + GOOD.strip() + b', {"te', r"F:2: the array is not closed; its last element starts"),
    ("array", "quote.json", b"[" + GOOD + b', {"text": "a}, ]', r"F:2: the array is not closed; its last element"),
    ("array", "after.json", b"[" + GOOD + b"]\n]", r"F:2: text after the end of the array \(line 3\); a row before"),
    ("array", "comma.json", b"[" + GOOD + b",]", r"F:2: broken JSON at line 2 of the file, column 1: .* the text"),
    ("array", "no-comma.json", b"[" + GOOD + GOOD + b"]", r"F:1: broken JSON at line 2 of the file, column 1: extra"),
    ("array", "inside.json", b'{"data": [' + GOOD + b"]}", r"F:1: the rows stand in a list under the key data; "),
    ("other text", "page.jsonl", b"<!DOCTYPE html>\n", r"F:1: broken JSON at column 1: .*; write one whole JSON"),
    ("other text", "list.jsonl", b"---\n- text: a\n", r"F:1: broken JSON at column 1: "),
    ("other text", "notes.jsonl", b"# my rows\n" + GOOD, r"F:1: broken JSON at column 1: "),
    ("other text", "table.jsonl", b"prompt,completion\na,b\n", r"F:1: broken JSON at column 1: "),
    ("other text", "lfs.jsonl", LFS, r"--data F: this is a Git LFS pointer, not the data; fetch that with git"),
    ("other text", "lfs.parquet", LFS, r"--data F: this is a Git LFS pointer, not the data; "),
    ("archive", "tar.jsonl", tar(), r"--data F: this is a tar archive, not text; save the rows in it as JSONL$"),
    ("archive", "tar.jsonl.gz", gzip.compress(tar()), r"--data F: in it is a tar archive, not text; save the rows in"),
    ("archive", "zip.jsonl", zipped(), r"--data F: this is a zip archive, not text; save the rows in it as JSONL$"),
    ("archive", "zip.parquet", zipped(), r"--data F: this is a zip archive, not text; "),
    ("archive", "gzip.jsonl", gzip.compress(GOOD), r"--data F: this is gzip, not text; let its name end in .gz$"),
    ("archive", "twice.jsonl.gz", gzip.compress(gzip.compress(GOOD)), r"--data F: in it is gzip, not text; save the"),
    ("archive", "zstd.jsonl.gz", zst(GOOD), r"--data F: this is zstd, not text; let its name end in .zst$"),
    ("archive", "bzip2.jsonl", bz2.compress(GOOD), r"--data F: this is bzip2, not text; "),
    ("archive", "xz.csv", lzma.compress(GOOD), r"--data F: this is xz, not text; "),
    ("other binary", "table.jsonl", parquet(), r"--data F: this is Parquet, not text; let its name end in .parquet$"),
    ("other binary", "rows.jsonl", pickle.dumps([{"text": "a"}]), r"F:1: not UTF-8 at byte 1 of the row; "),
    ("other binary", "rows.json", sqlite, r"--data F: this is an SQLite database, not text; "),
    ("other binary", "arrow.parquet", b"ARROW1\0\0" + b"\0" * 90, r"--data F: this is an Arrow file, not text; "),
    ("other binary", "random.csv", bytes(range(128, 256)) * 9, r"F:1: not UTF-8 at byte 1 of the row; "),
    ("gzip", "plain.jsonl.gz", GOOD, f"F: cannot be unpacked after row 0: Not a gzipped file .*{CUT}"),
    ("gzip", "head.jsonl.gz", gzip.compress(GOOD)[:5], f"F: cannot be unpacked after row 0: .*{CUT}"),
    ("gzip", "cut.csv.gz", gzip.compress(b"text\n" + b"a\n" * 999)[:-9], f"F: cannot be unpacked after row .*{CUT}"),
    ("gzip", "checksum.jsonl.gz", patched(gzip.compress(GOOD), -8, b"\1\2\3\4"), f"F: cannot be .* CRC .*{CUT}"),
    ("gzip", "tail.json.gz", gzip.compress(GOOD) + b"more", f"F: cannot be unpacked after row 0: Not a gzipped.*{CUT}"),
    ("gzip", "flipped.jsonl.gz", patched(gzip.compress(GOOD * 99), 14, b"\xff" * 9), f"F: cannot be .*{CUT}"),
    ("zstd", "plain.jsonl.zst", GOOD, f"F: cannot be unpacked after row 0: zstd decompressor error: .*{CUT}"),
    ("zstd", "head.jsonl.zst", zst(GOOD)[:3], f"F: cannot be unpacked after row 0: the file ends inside a frame{CUT}"),
    ("zstd", "cut.json.zst", zst(GOOD * 99)[:-3], f"F: cannot be unpacked after .* ends inside a frame{CUT}"),
    ("zstd", "tail.jsonl.zst", zst(GOOD) + b"more", f"F: cannot be unpacked after row 1: zstd .*{CUT}"),
    ("bomb", "zeros.jsonl.gz", lambda path: path.write_bytes(gzip.compress(bytes(1 << 17), 9) * (1 << 14)), BOMB),
    ("bomb", "lines.jsonl.zst", lambda path: path.write_bytes(zst(LONG * 10_000) * 50), BOMB),
    ("bomb", "blank.json.zst", lambda path: path.write_bytes(zst(b"\n" * (1 << 20)) * (1 << 10)), BOMB),
    ("bomb", "one-line.csv.zst", lambda path: path.write_bytes(zst(bytes(1 << 30))), BOMB),
    ("bomb", "cell.parquet", lambda path: path.write_bytes(parquet({"text": ["x" * 10**8]}, compression="zstd")), BOMB),
    ("parquet", "text.parquet", GOOD, PARQUET),
    ("parquet", "cut.parquet", parquet()[:-20], PARQUET),
    ("parquet", "head.parquet", parquet()[:30], PARQUET),
    ("parquet", "footer.parquet", patched(parquet(), -60, bytes(40)), PARQUET),
    ("parquet", "length.parquet", patched(parquet(), -8, b"\xff\xff\xff\x7f"), PARQUET),
    ("parquet", "page.parquet", patched(parquet(), 10, b"\xff" * 30), PARQUET),
    ("parquet", "marks.parquet", b"PAR1" + bytes(90) + b"PAR1", PARQUET),
    ("csv", "semicolon.csv", b"prompt;completion\na;b\n", r"--data F: the cells are not separated by commas:"),
    ("csv", "tab.csv", b"prompt\tcompletion\na\tb\n", r"--data F: the cells are not separated by commas: "),
    ("csv", "twice.csv", b"text,text\na,b\n", r"--data F: the header names a column twice: text$"),
    ("csv", "more.csv", b"prompt,completion\na,b,c\n", r"F:2: 3 cells, but the header has 2; a cell that holds a"),
    ("csv", "open.csv", b'text\n"a\nb\n', r"F:2: broken CSV: unexpected end of data; "),
    ("csv", "quote.csv", b'prompt,completion\n"a"x,b\n', r"F:2: broken CSV: .*; write a quote inside a cell twice"),
    ("csv", "no-header.csv", b"hello,world\nfoo,bar\n", r"F:2: unknown form of row with the keys hello, world;"),
    ("csv", "mac.csv", b"text\ra\rb\r", r"F:1: broken CSV: new-line character seen in unquoted field"),
    ("long", "garbage.jsonl", b"x" * 10_000_000 + b"\n" + GOOD, r"F:1: broken JSON at column 1: "),
    ("long", "string.jsonl", b'{"text": "' + b"x" * 10_000_000, r"F:1: broken JSON at column 10: unterminated"),
    ("long", "number.jsonl", b"1" * 10_000_000, r"F:1: a number has too many digits; "),
    ("long", "name.jsonl", b'{"' + b"k" * 10_000_000 + b'": 1}', r"F:1: unknown form of row with the keys kkkk.*\.\."),
    ("long", "endless.jsonl", sparse, r"F:1: the line is longer than 256 MiB; write one row on a line$"),
    ("wrong row", "string.json", b'"text"', r"F:1: a row must be an object, not a string; write "),
    ("wrong row", "nulls.jsonl", GOOD + b"null", r"F:2: a row must be an object, not null; write "),
    ("wrong row", "single.jsonl", b'{"role": "user", "content": "a"}', r"F:1: a single message, not a row; write "),
    ("wrong row", "role.jsonl", MESSAGES.replace(b"user", b"usr"), r'F:1: unknown role "usr" in message 1; did you '),
    ("wrong row", "keys.jsonl", b'{"question": "a", "answer": "b"}', r"F:1: unknown form of row with the keys"),
    ("name", "a.txt", GOOD, r"--data F: unknown file type; use one of .jsonl, .ndjson, .json, .parquet, .csv \("),
    ("name", "noending", GOOD, r"--data F: unknown file type; use one of "),
    ("name", "a.parquet.gz", gzip.compress(parquet()), r"--data F: unknown file type; use one of "),
    ("name", "absent.jsonl", lambda path: None, r"--data F: no such file or folder$"),
    ("folder", "folder.jsonl", folder(), r"--data F: the folder holds no data files; it should hold files of the"),
    ("folder", "saved", folder(data_arrow=b""), r"--data F: the folder holds no data files; datasets' save_to_disk"),
    ("folder", "splits", folder(train_jsonl=GOOD, test_jsonl=GOOD), r"--data F: the folder holds several splits"),
    ("folder", "twice", folder(a_jsonl=GOOD, a_csv=GOOD), r"--data F: F/a.csv and F/a.jsonl differ in file type"),
    ("folder", "one-bad", folder(a_jsonl=GOOD, b_jsonl=b"\n{"), r"F/b.jsonl:2: broken JSON at column 2: "),
    ("special file", "pipe.jsonl", lambda path: os.mkfifo(path), SPECIAL),
    ("special file", "pipe.parquet", lambda path: os.mkfifo(path), SPECIAL),
    ("special file", "null.jsonl", lambda path: path.symlink_to("/dev/null"), SPECIAL),
    ("special file", "zero.json", lambda path: path.symlink_to("/dev/zero"), SPECIAL),
    ("link", "loop.jsonl", lambda path: path.symlink_to(path.name), r"--data F: no such file or folder"),
    ("link", "dangling.jsonl", lambda path: path.symlink_to("gone.jsonl"), r"--data F: no such file or folder"),
    ("unreadable", "memory.jsonl", lambda path: path.symlink_to("/proc/self/mem"), r"--data F: cannot be read:"),
]  # fmt: skip

ONLY_LINUX = ("pipe.jsonl", "pipe.parquet", "null.jsonl", "zero.json", "memory.jsonl")


def made(path: Path, content: bytes | Make) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return path


def first_said(source: Path) -> str:
    """What is said first of a source, by the real reader, and that all the rest is read or said too."""
    try:
        errors = list(check(str(source)))
    except UserError as error:
        return str(error)
    assert errors, "taken for good"
    assert all(error.line is None or error.line > 0 for error in errors)
    return str(errors[0])


@pytest.mark.parametrize(("kind", "name", "content", "said"), TABLE, ids=[f"{row[0]}: {row[1]}" for row in TABLE])
def test_a_malformed_file_ends_in_its_message(
    tmp_path: Path, kind: str, name: str, content: bytes | Make, said: str
) -> None:
    if name in ONLY_LINUX and sys.platform != "linux":
        pytest.skip("needs pipes, devices and /proc")
    begin = time.perf_counter()
    text = first_said(made(tmp_path / name, content)).replace(str(tmp_path / name), "F")
    assert re.match(said, text.splitlines()[0]), text
    assert 1 <= len(text.splitlines()) <= 5 and len(text) < 700
    assert all(char.isprintable() or char == "\n" for char in text)  # steers no terminal
    assert not (tmp_path.parent / "escaped.jsonl").exists()
    assert time.perf_counter() - begin < 10


def test_the_table_is_as_large_as_it_is_said_to_be() -> None:
    kinds = {row[0] for row in TABLE}
    assert len(TABLE) >= 60 and len(kinds) >= 15
    assert len({row[:2] for row in TABLE}) == len(TABLE)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_that_may_not_be_read(kind: str) -> None:
    """As another user where the tests run as root, whom nothing is forbidden."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no permissions of this kind")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        locked = folder / "locked"
        locked.mkdir()
        (locked / "a.jsonl").write_bytes(GOOD)
        source = locked / "a.jsonl" if kind == "file" else locked
        source.chmod(0)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            assert first_said(source) == f"--data {source}: cannot be read: Permission denied"
        finally:
            if root:
                os.seteuid(0)
            source.chmod(0o700)


def test_a_pipe_is_not_waited_for(tmp_path: Path, tiny_llama: Path) -> None:
    """Nor where no row is looked at before the file is hashed."""
    from litft import SFT, ChatData

    data = ChatData(str(made(tmp_path / "pipe.jsonl", lambda path: os.mkfifo(path))), chat_template="chatml")
    with pytest.raises(UserError, match=r"pipe\.jsonl: this is a pipe or a device, not a file"):
        data.prepare(SFT(str(tiny_llama)), max_epochs=1)


BOUNDED = """
import resource, sys
from litft.data.rows import check
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for error in check(sys.argv[1]):
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("name", [row[1] for row in TABLE if row[0] == "bomb"])
def test_a_bomb_takes_little_memory(tmp_path: Path, name: str) -> None:
    """Files of kilobytes that unpack to 0.1 to 2 GB."""
    path = made(tmp_path / name, next(row[2] for row in TABLE if row[:2] == ("bomb", name)))
    assert path.stat().st_size < 4 << 20
    done = subprocess.run([sys.executable, "-c", BOUNDED, path], capture_output=True, text=True, timeout=60)
    *said, grown = done.stdout.splitlines()
    assert "over 200 times" in said[-1], done.stderr
    assert int(grown) < 300, grown


def test_a_file_that_packs_well_is_no_bomb(tmp_path: Path) -> None:
    rows = GOOD * 200_000  # 3.4 MB, in 5 kB
    for name, packed in (("a.jsonl.gz", gzip.compress(rows)), ("a.jsonl.zst", zst(rows))):
        assert len(rows) > 250 * len(packed)
        found = check(str(made(tmp_path / name, packed)))
        assert (list(found), found.rows) == ([], 200_000)


COMMANDS = ["syntax: cut.jsonl", "archive: zip.jsonl", "bomb: lines.jsonl.zst", "special file: pipe.jsonl",
            "parquet: page.parquet", "name: absent.jsonl", "not UTF-8: latin.jsonl"]  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_says_it_and_exits_with_2(tmp_path: Path, case: str) -> None:
    _, name, content, said = next(row for row in TABLE if f"{row[0]}: {row[1]}" == case)
    path = made(tmp_path / name, content)
    command = [sys.executable, "-m", "litft", "data", "check", str(path)]
    # a terminal that knows no more than ASCII: what it can't show is no reason to fail
    env = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    lines = done.stderr.removeprefix("error: ").splitlines() + done.stdout.splitlines()
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert re.match(said, lines[0].replace(str(path), "F")), lines
    assert len(lines) <= 5 and "Traceback" not in done.stderr
