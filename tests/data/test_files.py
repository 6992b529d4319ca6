import csv
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from litft.data import jsontext
from litft.data.files import Row, find_files, read_rows, total_bytes
from litft.data.jsontext import array_elements, snippet
from litft.errors import DataError, UserError

ROWS = [{"text": "a"}, {"text": "b\u2028c\u0085d\ufeff\u200b\u202e"}, {"text": "e\r\nf\x00\U0001f600"}]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def values(source, **more):
    rows = list(read_rows(str(source), **more))
    assert [row.error for row in rows] == [None] * len(rows)
    return [row.value for row in rows]


def errors(path):
    return [(row.line, str(row.error).replace(path, "F")) for row in read_rows(path) if row.error]


def jsonl(rows, ascii=False):
    return "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows).encode()


# ---- what is read


def test_i7_only_line_feeds_cut_lines(tmp_path):
    # the characters that str.splitlines takes for line ends, but JSON does not
    texts = ["a\u2028b", "a\u2029b", "a\u0085b", "\x0b\x0c\x1c\x1d\x1e", "\U0001f600", "x" * 5_000_000, "\ufeff"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).replace("\x0b", "\\u000b") for text in texts]
    body = b"\xef\xbb\xbf" + "\r\n\r\n  \n".join(lines).encode()  # BOM, CRLF, blank lines, no newline at the end
    rows = list(
        read_rows(write(tmp_path, "a.jsonl", re.sub(rb"[\x1c-\x1e\x0c]", lambda m: b"\\u%04x" % m[0][0], body)))
    )
    assert [row.value["text"] for row in rows] == texts
    assert [row.line for row in rows] == [1, 4, 7, 10, 13, 16, 19]


def test_i2_arguments_keep_their_own_keys(tmp_path):
    arguments = [{"x": 1}, {"city": "SF", "t": "a"}, {"t": 5}, {"x": {"y": None}}, {}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": a}]}]} for a in arguments]
    path = write(tmp_path, "a.jsonl", jsonl(rows))
    assert values(path) == rows
    assert values(write(tmp_path, "b.jsonl", jsonl(rows[::-1]))) == rows[::-1]
    assert values(write(tmp_path, "a.json", json.dumps(rows))) == rows


def test_i2_parquet_drops_the_nulls_that_a_table_adds(tmp_path):
    arguments = [{"x": 1, "content": None}, {"t": "a"}, {}]
    rows = [
        {
            "messages": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": a}]}],
            "tools": [{"name": "f", "parameters": {"properties": {key: {"type": "string"} for key in a}}}],
        }
        for a in arguments
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = values(tmp_path / "a.parquet")
    calls = [row["messages"][0]["tool_calls"][0]["arguments"] for row in read]
    assert calls == [{"x": 1}, {"t": "a"}, {}]
    assert [list(row["tools"][0]["parameters"]["properties"]) for row in read] == [["x", "content"], ["t"], []]
    assert read[0]["messages"][0]["content"] is None  # outside of calls a null stays: it means an empty text


@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_text_format_and_compression_gives_the_same_rows(tmp_path, pack, bom):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[pack]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["text"])
    writer.writeheader()
    writer.writerows(ROWS)
    bodies = {
        "a.jsonl": jsonl(ROWS),
        "b.NDJSON": jsonl(ROWS, ascii=True),
        "c.json": json.dumps(ROWS).encode(),
        "d.json": b" \n " + json.dumps(ROWS, indent=3, ensure_ascii=False).encode() + b"\n",
        "lines.json": jsonl(ROWS),
        "e.csv": text.getvalue().encode(),
    }
    for name, body in bodies.items():
        assert values(write(tmp_path, name + pack, compress(bom + body))) == ROWS, name


def test_compressed_files_of_several_parts(tmp_path):
    one, two = jsonl(ROWS[:1]), jsonl(ROWS[1:])
    assert values(write(tmp_path, "a.jsonl.gz", gzip.compress(one) + gzip.compress(two))) == ROWS
    pack = zstandard.ZstdCompressor().compress
    assert values(write(tmp_path, "a.jsonl.zst", pack(one) + pack(two))) == ROWS


def test_a_json_file_of_one_object(tmp_path):
    row = {"messages": [{"role": "user", "content": "x"}], "n": 1}
    for indent in (None, 1):
        assert values(write(tmp_path, f"{indent}.json", json.dumps(row, indent=indent))) == [row]
    assert values(write(tmp_path, "c.json", '{"messages": [\n{"role": "user", "content": "x"}\n], "n": 1}')) == [row]


def test_parquet_rows(tmp_path):
    rows = [{"text": f"{i}", "n": i} for i in range(300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=70)
    assert values(tmp_path / "a.parquet") == rows
    assert [row.line for row in read_rows(str(tmp_path / "a.parquet"))] == list(range(1, 301))


def test_csv_quotes_lines_and_nothing_but_strings(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,completion\r\n"a, ""b""\nc",1\n\n,"null"\n')
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [
        {"prompt": 'a, "b"\nc', "completion": "1"},
        {"prompt": "", "completion": "null"},
    ]
    assert [row.line for row in rows] == [2, 5]  # where the row starts
    assert values(write(tmp_path, "long.csv", "text\n" + "x" * 500_000)) == [{"text": "x" * 500_000}]


def test_a_folder_is_searched_in_order(tmp_path):
    for name in ("b.jsonl", "a/2.jsonl", "a/1.json", "a.b/0.jsonl", ".hidden/x.jsonl", "_cache/x.jsonl", ".x.jsonl"):
        write(tmp_path, name, jsonl([{"text": name}]))
    write(tmp_path, "README.md", "not data")
    assert [row["text"] for row in values(tmp_path)] == ["a/1.json", "a/2.jsonl", "a.b/0.jsonl", "b.jsonl"]
    assert next(os.path.relpath(row.file, tmp_path) for row in read_rows(str(tmp_path))) == "a/1.json"


def test_progress_adds_up_to_the_size(tmp_path):
    rows = [{"text": "x" * 1000 + str(i)} for i in range(3000)]
    write(tmp_path, "a.jsonl", jsonl(rows))
    write(tmp_path, "b.jsonl.gz", gzip.compress(jsonl(rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    seen = []
    values(tmp_path, progress=seen.append)
    assert sum(seen) == total_bytes(str(tmp_path)) == sum(os.path.getsize(f) for f in find_files(str(tmp_path)))
    assert len(seen) > 5
    assert total_bytes("org/name") is None


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    rows = [{"text": str(i) * 2000} for i in range(5_000)]  # 38 MB
    if name.endswith(".json"):
        body = json.dumps(rows).encode()
    elif name.endswith(".csv"):
        body = ("text\n" + "\n".join(row["text"] for row in rows)).encode()
    else:
        body = jsonl(rows)
    path = write(tmp_path, name, gzip.compress(body, 1) if name.endswith(".gz") else body)
    del body
    tracemalloc.start()
    try:
        count = sum(row.error is None for row in read_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5_000
    assert peak < 12 << 20


# ---- broken rows: an error in their place, and the rows after them

GOOD = '{"text": "good"}'
BROKEN_LINES = [  # a line, and what is said of it
    ('{"text": "a",}', 'broken JSON at column 1[34]: .*; remove the last comma\n    {"text": "a",}'),
    ("{'text': 'a'}", "broken JSON at column 2: .*; strings take double quotes in JSON"),
    ('{"text": None}', "broken JSON at column 10: .*; write true, false or null"),
    ('{"text": "a', "broken JSON at column 10: unterminated string; close the string with a double quote"),
    (
        '{"text": "a\tb"}',
        r"broken JSON at column 12: invalid control character; write a line break as \\n and a tab as \\t",
    ),
    (r'{"text": "C:\dir"}', r"broken JSON at column 13: invalid \\escape; write a backslash as \\\\"),
    ('{"text": "a"} {"text": "b"}', "broken JSON at column 15: extra data; write one JSON value on a line"),
    (
        '{"text": "he said "no""}',
        r"broken JSON at column 20: .*; a comma is missing, or a quote inside a string is not written",
    ),
    ('{"text": ', "broken JSON at column 10: .*; the text ends too early"),
    ("text: a", "broken JSON at column 1: .*; write one whole JSON value\n    text: a"),
    ('{"text": NaN}', "NaN is not JSON; write null, or quote it"),
    ('{"text": -Infinity}', "-Infinity is not JSON; write null, or quote it"),
    ('{"n": 1e999}', "number out of range; write a smaller number or a string"),
    ('{"n": ' + "9" * 5000 + "}", "a number has too many digits; write a shorter number or a string"),
    ('{"text": "a", "text": "b"}', 'key "text" stands twice in one object; keep one of the two'),
    ("[" * 100_000, r"JSON nested too deeply; flatten the row\n    \[\[+\.\.\."),
    (b'{"text": "caf\xe9"}', 'not UTF-8 at byte 14 of the row; save the file as UTF-8\n    {"text": "caf\ufffd"}'),
    ("\x1b[31mred\x1b[0m", r"broken JSON at column 1: .*\n    \\u001b\[31mred\\u001b\[0m"),
    ("\x00" * 50, r"broken JSON at column 1: .*\n    (\\u0000)+\.\.\."),
]


@pytest.mark.parametrize(("line", "said"), BROKEN_LINES, ids=range(len(BROKEN_LINES)))
def test_a_broken_line_is_an_error_in_its_place(tmp_path, line, said):
    line = line.encode() if isinstance(line, str) else line
    path = write(tmp_path, "a.jsonl", b"\n".join([GOOD.encode(), line, GOOD.encode()]))
    rows = list(read_rows(path))
    assert [row.value for row in rows if not row.error] == [{"text": "good"}] * 2
    (error,) = [row.error for row in rows if row.error]
    assert (rows[1].line, error.line, error.file) == (2, 2, path)
    assert re.match(f"{re.escape(path)}:2: {said}", str(error)), str(error)
    assert len(error.snippet) <= 80
    assert error.snippet.isprintable()
    assert str(error).count("\n") <= 4


@pytest.mark.parametrize(("line", "said"), BROKEN_LINES[:8] + BROKEN_LINES[10:15])
def test_a_broken_element_of_an_array_does_not_hide_the_others(tmp_path, line, said):
    if said.startswith("broken JSON at column 10: unterminated"):
        return  # the quotes of the whole file are off then: see below
    path = write(tmp_path, "a.json", f"[{GOOD},\n{GOOD},\n   {line},\n{GOOD}]")
    rows = list(read_rows(path))
    assert [row.value for row in rows if not row.error] == [{"text": "good"}] * 3
    (error,) = [row.error for row in rows if row.error]
    assert error.line == 3  # the third row
    if "column" in said:
        assert error.what.startswith("broken JSON at line 3 of the file, column")


def test_a_huge_line_is_read_and_one_over_the_limit_is_an_error(tmp_path, monkeypatch):
    big = {"text": "x" * 12_000_000}
    assert values(write(tmp_path, "a.jsonl", jsonl([big, *ROWS]))) == [big, *ROWS]
    path = write(tmp_path, "b.jsonl", b'{"text": "' + b"x" * 12_000_000 + b"\n" + jsonl(ROWS))
    assert len(errors(path)[0][1]) < 300
    monkeypatch.setattr(jsontext, "MAX_ROW_BYTES", 4 << 20)
    path = write(tmp_path, "c.jsonl", jsonl([ROWS[0], big, *ROWS]))
    rows = list(read_rows(path))
    assert [row.value for row in rows if not row.error] == [ROWS[0], *ROWS]
    assert str(rows[1].error).startswith(f"{path}:2: the line is longer than 4 MiB; write one row on a line\n    ")
    path = write(tmp_path, "d.json", json.dumps([big]))
    with pytest.raises(DataError, match="element that starts on line 1 of the file is longer than 4 MiB"):
        list(read_rows(path))


def test_broken_csv_rows(tmp_path):
    body = b'prompt,completion\na,b\na,b,c\nonly\n"a"x,b\ncaf\xe9,b\nx,y\n"open,b\n'
    path = write(tmp_path, "a.csv", body)
    assert [row.value for row in read_rows(path) if not row.error] == [
        {"prompt": "a", "completion": "b"},
        {"prompt": "x", "completion": "y"},
    ]
    said = dict(errors(path))
    assert said[3].startswith("F:3: 3 cells, but the header has 2; a cell that holds a comma or a line break stands in")
    assert said[4].startswith("F:4: 1 cells, but the header has 2")
    assert said[5].startswith("F:5: broken CSV: ")
    assert said[6].startswith("F:6: not UTF-8 at byte 4 of the row; save the file as UTF-8")
    assert said[8].startswith('F:8: broken CSV: unexpected end of data; write a quote inside a cell twice ("")')


# ---- files that cannot be read

BROKEN_FILES = [  # name, content, what is said
    ("a.jsonl", "", "--data F: no rows in it: the file is empty"),
    ("a.jsonl", " \r\n\n", "--data F: no rows in it: the file is empty"),
    ("a.jsonl", b"\xef\xbb\xbf", "--data F: no rows in it: the file is empty"),
    ("a.json", "", "--data F: no rows in it: the file is empty"),
    ("a.json", " [ \n ] ", "--data F: no rows in it: the file is empty"),
    ("a.csv", "prompt,completion\n", "--data F: no rows in it: the file is empty"),
    ("a.parquet", "", "--data F: no rows in it: the file is empty"),
    ("a.jsonl.gz", "", "--data F: no rows in it: the file is empty"),
    ("a.txt", "x", "--data F: unknown file type; use one of .jsonl, .ndjson, .json, .parquet, .csv"),
    ("a", "x", "--data F: unknown file type"),
    ("a.parquet.gz", "x", "--data F: unknown file type"),
    ("a.jsonl", GOOD.encode("utf-16"), "--data F: the text is UTF-16; save it as UTF-8"),
    ("a.jsonl", f"[\n{GOOD},\n{GOOD}\n]", "--data F: this is a JSON array, not one row a line; name the file .json"),
    ("a.json", f"[{GOOD}, {GOOD}", "F:2: the array is not closed; its last element starts on line 1 of the file"),
    ("a.json", f"[{GOOD},\n" + '{"text": "a}]', "F:2: the array is not closed; its last element starts on line 2"),
    ("a.json", f"[{GOOD}]\n]", r"F:2: text after the end of the array \(line 2\)"),
    ("a.jsonl.gz", GOOD, "F: cannot be unpacked after row 0: Not a gzipped file"),
    (
        "a.jsonl.gz",
        gzip.compress(jsonl(ROWS))[:-9],
        "F: cannot be unpacked after row [0-3]: .*; the archive is cut off",
    ),
    ("a.jsonl.zst", GOOD, "F: cannot be unpacked after row 0: zstd .*; the archive is cut off or damaged"),
    (
        "a.jsonl.zst",
        zstandard.ZstdCompressor().compress(jsonl(ROWS))[:-4],
        "F: cannot be unpacked after row [0-3]: the file ends inside a frame",
    ),
    ("a.parquet", "PAR1 no table", "F: cannot be read as Parquet after row 0: "),
    ("a.csv", "text,text\na,b\n", "--data F: the header names a column twice: text"),
    ("a.csv", "prompt;completion\na;b\n", "--data F: the cells are not separated by commas: prompt;completion"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN_FILES, ids=range(len(BROKEN_FILES)))
def test_a_file_that_cannot_be_read(tmp_path, name, content, said):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    assert re.match(said, str(caught.value).replace(path, "F")), str(caught.value)
    assert 1 <= len(str(caught.value).splitlines()) <= 5


def test_nothing_there_names_what_is(tmp_path):
    write(tmp_path, "train.jsonl", GOOD)
    missing = str(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean .*/train\.jsonl\?$"):
        read_rows(missing)
    with pytest.raises(UserError, match=r"no such file or folder$"):
        read_rows(str(tmp_path / "quite-different.parquet"))
    with pytest.raises(UserError, match=f"there is no folder {tmp_path}/none"):
        read_rows(str(tmp_path / "none" / "a.jsonl"))
    for odd in ("", "\0", "x" * 5000, "\udc80", "a\nb.jsonl"):
        with pytest.raises(UserError):
            read_rows(odd)


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"holds no data files; it should hold files of the types \.jsonl"):
        read_rows(str(tmp_path))
    write(tmp_path, "saved/data-00000.arrow", "x")
    with pytest.raises(UserError, match=r"holds no data files; datasets' save_to_disk wrote it: .* to_parquet"):
        read_rows(str(tmp_path / "saved"))
    write(tmp_path, "split/train-00000-of-00001.jsonl", GOOD)
    assert values(tmp_path / "split") == [{"text": "good"}]
    write(tmp_path, "split/test/0.jsonl", GOOD)
    with pytest.raises(UserError, match=r"holds several splits \(test, train\); name the files or the folder of one"):
        read_rows(str(tmp_path / "split"))
    write(tmp_path, "twice/a.jsonl", GOOD)
    write(tmp_path, "twice/a.jsonl.gz", gzip.compress(GOOD.encode()))
    with pytest.raises(UserError, match=r"a\.jsonl and .*a\.jsonl\.gz differ in file type only"):
        read_rows(str(tmp_path / "twice"))


def test_unreadable_files_are_the_users_to_mend(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(UserError):
        list(read_rows(str(tmp_path / "loop.jsonl")))
    path = write(tmp_path, "a.jsonl", GOOD)
    rows = read_rows(path)
    os.unlink(path)
    with pytest.raises(UserError, match="cannot be read: No such file or directory"):
        list(rows)


# ---- against the standard library, on anything


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(['"', "\\", "]}", ","]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=8,
        ),
        max_size=5,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.integers(1, 9),
)
def test_an_array_is_cut_as_json_reads_it(rows, indent, ascii, chunk):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
    cut = [json.loads(element) for element, _ in array_elements(io.BytesIO(text[1:]), chunk=chunk)]
    assert cut == rows


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.zst"]),
    st.lists(
        st.binary(max_size=30)
        | st.sampled_from(
            [b"{", b"}", b"[", b"]", b'"', b",", b"\n", b"\\", b'{"text": "a"}', b"PAR1", b"\x1f\x8b\x08"]
        ),
        max_size=12,
    ),
)
def test_only_user_errors_leave_on_any_bytes(tmp_path, name, parts):
    path = write(tmp_path, name, b"".join(parts))
    try:
        for row in read_rows(path):
            assert isinstance(row, Row)
            assert row.error is None or (len(row.error.snippet) <= 80 and row.error.snippet.isprintable())
    except UserError as error:
        assert len(str(error).splitlines()) <= 5


@given(st.text(st.characters(codec=None), max_size=300), st.integers(0, 300))
def test_snippets_are_short_and_printable(text, at):
    shown = snippet(text, min(at, len(text)))
    assert len(shown) <= 80
    assert shown.isprintable()


def test_reading_imports_no_model_library(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD)
    code = (
        f"import sys; from litft.data.files import read_rows; list(read_rows({path!r}));"
        "print([m for m in ('torch', 'transformers', 'lightning', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
