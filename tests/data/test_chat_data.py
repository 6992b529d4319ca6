"""From files to planned steps: the cache, the length limit, the split, and what a loader hands out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CHATML, chat_rows, save_tiny, tiny_tokenizer, write_jsonl

from litft import SFT, ChatData, DataError, Full, UserError
from litft.data import tokens
from litft.data.files import read_rows
from litft.data.tokens import encode_file, open_store
from litft.engine.console import plan_lines


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", chat_rows(60))


def prepared(model: Path, data: Any, max_epochs: int = 1, ranks: int = 1, rank: int = 0, **options: Any) -> Any:
    chat = ChatData(str(data) if isinstance(data, Path) else data, **options)
    return chat.prepare(SFT(str(model), Full()), max_epochs=max_epochs, ranks=ranks, rank=rank)


def stores(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "cache" / "tokens").iterdir()}


def ids_of(data: ChatData) -> list[list[int]]:
    return [data.selection.read(i)[0].tolist() for i in range(len(data.selection))]


# ---- what is encoded


def test_ids_are_those_of_the_chat_template(tiny_llama: Path, rows: Path) -> None:
    data = prepared(tiny_llama, rows, val_fraction=0.0)
    tokenizer = tiny_tokenizer()
    for index, row in enumerate(chat_rows(60)):
        ids, trained = data.selection.read(index)
        assert ids.tolist() == tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        answers = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        assert tokenizer.decode(ids[trained]) == "".join(answers)
        assert data.selection.name(index) == f"{rows}:{index + 1}"


# ---- i1: the cache


def test_i1_an_unchanged_file_is_encoded_once(
    tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(tiny_llama, rows)
    before = stores(tmp_path)
    assert len(before) == 1
    monkeypatch.setattr(tokens, "_write", lambda *a: pytest.fail("encoded again"))
    again = prepared(tiny_llama, rows)
    assert ids_of(first) == ids_of(again) and stores(tmp_path) == before
    copy = rows.rename(rows.with_name("renamed.jsonl"))  # the same rows under another name
    renamed = prepared(tiny_llama, copy)
    assert renamed.selection.name(0) == first.selection.name(0).replace("rows.jsonl", "renamed.jsonl")
    assert len(renamed.held_out_prompts(3)) == 3
    prepared(tiny_llama, copy, max_length=50, overlong="truncate")  # lengths are cut when rows are read
    assert stores(tmp_path) == before


def test_i1_one_changed_byte_is_seen(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    first = prepared(tiny_llama, rows, val_fraction=0.0)
    stat, content = rows.stat(), rows.read_bytes()
    rows.write_bytes(content.replace(b"0: ", b"9: ", 1))
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert rows.stat().st_size == stat.st_size and rows.stat().st_mtime_ns == stat.st_mtime_ns
    second = prepared(tiny_llama, rows, val_fraction=0.0)
    assert ids_of(first) != ids_of(second) and len(stores(tmp_path)) == 2
    assert first.fingerprint != second.fingerprint


def test_i1_whatever_decides_the_ids_is_in_the_key(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    prepared(tiny_llama, rows)
    other = save_tiny(tmp_path / "other", template=CHATML.replace("message['role']", "message['role'] | upper"))
    padded = save_tiny(tmp_path / "padded")
    tiny_tokenizer(pad_token="<|im_end|>").save_pretrained(padded)
    cases: list[tuple[Path, dict[str, Any]]] = [
        (other, {}),
        (padded, {}),
        (tiny_llama, {"train_on": "last"}),
        (tiny_llama, {"allow_special_tokens": True}),
    ]
    for count, (model, options) in enumerate(cases, start=2):
        prepared(model, rows, **options)
        assert len(stores(tmp_path)) == count


def test_i1_a_file_below_the_home_folder_is_seen_to_change(
    tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first = ids_of(prepared(tiny_llama, f"~/{rows.name}"))
    rows.write_bytes(rows.read_bytes().replace(b"0: ", b"9: "))
    assert ids_of(prepared(tiny_llama, f"~/{rows.name}")) != first


def test_i1_another_version_of_transformers_is_in_the_key(
    tiny_llama: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    prepared(tiny_llama, rows)
    monkeypatch.setattr(transformers, "__version__", "99.0")
    prepared(tiny_llama, rows)
    assert len(stores(tmp_path)) == 2


def test_a_data_object_is_encoded_anew_for_another_model(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    upper = save_tiny(tmp_path / "other", template=CHATML.replace("message['role']", "message['role'] | upper"))
    data = ChatData(str(rows), val_fraction=0.0)
    first = ids_of(data.prepare(SFT(str(tiny_llama), Full()), max_epochs=1))
    second = ids_of(data.prepare(SFT(str(upper), Full()), max_epochs=1))
    assert first != second
    steps = data.total_steps
    assert data.prepare(SFT(str(upper), Full()), max_epochs=3).total_steps > steps


# ---- the store


def encode(row: Any) -> Any:
    from types import SimpleNamespace

    if row.error is not None:
        raise row.error
    text = row.value["messages"][-1]["content"]
    if "bad" in text:
        raise DataError("is bad", file=row.file, line=row.line, mend="make it good")
    ids = [ord(c) % 384 for c in text]
    return (
        "messages",
        SimpleNamespace(ids=ids, trained=[True] * len(ids), notes=()),
        row.value["messages"][0]["content"],
    )


def store_of(folder: Path, file: Path, workers: int = 1, skip: bool = False, encode: Any = encode) -> tokens.TokenStore:
    return encode_file(lambda: read_rows(str(file)), encode, folder, file=str(file), skip_bad=skip, workers=workers)


def test_workers_give_the_same_store(tmp_path: Path) -> None:
    rows = chat_rows(700)
    rows[400]["messages"][-1]["content"] = "bad"
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    one, three = (store_of(tmp_path / str(n), file, n, skip=True) for n in (1, 3))
    for name in ("ids", "trained", "offsets", "lines", "prompts"):
        assert np.array_equal(getattr(one, name), getattr(three, name)), name
    assert one.digest == three.digest and one.bad == three.bad == 1
    assert one.skipped == three.skipped and "rows.jsonl:401" in one.skipped[0]
    assert 401 not in one.lines and len(one) == 699
    assert not one.trained[one.offsets[:-1]].any()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_bad_row_is_named_and_leaves_no_store(workers: int, tmp_path: Path) -> None:
    rows = chat_rows(300)
    rows[199]["messages"][-1]["content"] = "bad"
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows\.jsonl:200") as found:
        store_of(tmp_path / "store", file, workers)
    assert "make it good" in str(found.value)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_error_that_is_no_data_error_is_not_swallowed(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(3))
    for workers in (1, 2):
        with pytest.raises(ZeroDivisionError):
            store_of(tmp_path / "store", file, workers, encode=divide)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(300))
    with pytest.raises(UserError, match="worker process was killed"):
        store_of(tmp_path / "store", file, 2, encode=die)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def die(row: Any) -> Any:
    if row.line == 200:
        os._exit(9)
    return encode(row)


def divide(row: Any) -> Any:
    return 1 / 0


def test_two_writers_at_once(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(50))
    inner: list[tokens.TokenStore] = []

    def slow(row: Any) -> Any:
        if not inner:  # another process comes and finishes while this one is writing
            inner.append(store_of(tmp_path / "store", file))
        return encode(row)

    outer = store_of(tmp_path / "store", file, encode=slow)
    assert outer.digest == inner[0].digest and np.array_equal(outer.ids, inner[0].ids)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "store"]


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(50))

    def killed(row: Any) -> Any:
        if row.line == 30:
            raise KeyboardInterrupt
        return encode(row)

    with pytest.raises(KeyboardInterrupt):
        store_of(tmp_path / "store", file, encode=killed)
    assert not (tmp_path / "store").exists()
    assert len(store_of(tmp_path / "store", file)) == 50


def test_a_store_reopens_as_it_was_written(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(9))
    written, opened = store_of(tmp_path / "store", file), open_store(tmp_path / "store", str(file))
    for index, row in enumerate(chat_rows(9)):
        text = row["messages"][-1]["content"]
        for store in (written, opened):
            ids, trained = store.document(index)
            assert ids.tolist() == [ord(c) % 384 for c in text] and trained.tolist() == [False] + [True] * (
                len(text) - 1
            )
    assert isinstance(opened.ids, np.memmap)


def test_trained_counts_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(100))
    store = store_of(tmp_path / "store", file)
    for block in (1, 7, 100, 4096):
        monkeypatch.setattr(tokens, "ROWS_AT_ONCE", block)
        for cut in (None, 1, 9, 10**6):
            assert store.trained_counts(cut).tolist() == [int(store.document(i, cut)[1].sum()) for i in range(100)]


def test_what_the_template_leaves_out_is_counted_and_said(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    late = chat_rows(30)
    for row in late[:5]:
        row["messages"][-1]["reasoning_content"] = "because"
    val = write_jsonl(tmp_path / "val.jsonl", late)
    note = "the chat template does not render the reasoning of the last answer"
    cases: list[tuple[Path, dict[str, Any], int]] = [
        (val, {}, 5),
        (rows, {"val": str(val)}, 5),
        (val, {"val": str(val)}, 10),
    ]
    for train, options, count in cases:
        for _ in range(2):  # encoded, and from the cache
            summary = prepared(tiny_llama, train, **options).summary()
            assert summary["notes"] == {note: count}
        assert sum(f"note: {note} ({count} rows)" in line for line in plan_lines(summary)) == 1
    assert prepared(tiny_llama, rows).summary()["notes"] == {}


# ---- b4, b7: the length limit


def long_and_short(tmp_path: Path) -> Path:
    def row(words: int, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "why " * words}, {"role": "assistant", "content": answer}]}

    return write_jsonl(tmp_path / "limit.jsonl", [row(3, "the sun"), row(200, "moon"), row(5, "old stone " * 60)])


def test_overlong_rows_are_dropped_and_counted(tiny_llama: Path, tmp_path: Path) -> None:
    data = prepared(tiny_llama, long_and_short(tmp_path), max_length=64)
    assert len(data.selection) == 1 and data.selection.dropped == {"longer than 64 tokens": 2}
    assert data.summary()["dropped"] == {"longer than 64 tokens": 2} and data.summary()["rows_read"] == 3


def test_b4_b7_truncation_keeps_what_is_left_of_the_answer(tiny_llama: Path, tmp_path: Path) -> None:
    file = long_and_short(tmp_path)
    whole = prepared(tiny_llama, file, max_length=512)
    data = prepared(tiny_llama, file, max_length=64, overlong="truncate")
    assert len(data.selection) == 2, "the row whose answer is cut off has nothing to train on"
    assert data.selection.dropped == {"nothing to train on within the limit": 1} and data.selection.truncated == 1
    ids, trained = data.selection.read(1)
    full_ids, full_trained = whole.selection.read(2)
    assert len(ids) == 64 and np.array_equal(ids, full_ids[:64]) and np.array_equal(trained, full_trained[:64])
    assert trained[-1] and int(data.selection.trained[1]) == int(trained.sum()) > 20
    (step,) = data.train_dataloader(0, 0) if len(data.plan.steps(0)) == 1 else [None]
    if step is not None:
        assert step["trained"] == sum(batch["trained"] for batch in step["micro_batches"])


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_c2_kept_and_lost_tokens_are_all_tokens(overlong: Any, tiny_llama: Path, tmp_path: Path) -> None:
    """A document over the limit is dropped whole, or loses its tail: no piece of it begins a row of its own."""
    file = long_and_short(tmp_path)
    data = prepared(tiny_llama, file, max_length=64, overlong=overlong, tokens_per_step=80, tokens_per_batch=80)
    template = tiny_tokenizer().apply_chat_template
    rows = [template(row.value["messages"], return_dict=True)["input_ids"] for row in read_rows(str(file))]
    whole = {f"{file}:{line}": ids for line, ids in enumerate(rows, start=1)}
    kept = {data.selection.name(i): data.selection.read(i)[0].tolist() for i in range(len(data.selection))}
    assert all(ids == whole[name][: len(ids)] for name, ids in kept.items())
    left_out = sum(len(ids) for name, ids in whole.items() if name not in kept)
    tails = sum(len(whole[name]) - len(ids) for name, ids in kept.items())
    assert tails == 0 or overlong == "truncate"
    assert data.summary()["tokens"] + left_out + tails == sum(map(len, rows))
    assert sum(data.selection.dropped.values()) + len(kept) == 3
    steps = list(data.train_dataloader(0, 0))
    documents = [
        batch["input_ids"][0, a:b].tolist()
        for step in steps
        for batch in step["micro_batches"]
        for a, b in pairwise(batch["document_bounds"])
        if b <= batch["tokens"]  # what fills the row up comes last
    ]
    assert sorted(documents) == sorted(kept.values())


def test_what_validation_loses_is_counted_for_each_set(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "no answer"}]}
    hard = write_jsonl(tmp_path / "hard.jsonl", [bad, *map(dict, chat_rows(5)), bad])
    val = {"easy": str(write_jsonl(tmp_path / "easy.jsonl", chat_rows(4))), "hard": str(hard)}
    long = str(long_and_short(tmp_path))
    data = prepared(tiny_llama, rows, val=val | {"long": long}, bad_rows="skip", max_length=200)
    summary = data.summary()
    assert summary["val_rows"] == {"easy": 4, "hard": 5, "long": 2} and summary["dropped"] == {}
    assert summary["val_dropped"] == {"hard": {"bad rows skipped": 2}, "long": {"longer than 200 tokens": 1}}
    text = "\n".join(plan_lines(summary))
    assert "2 rows left out (hard): bad rows skipped" in text and "1 rows left out (long): longer than 200" in text
    assert "skipped" in text and f"{hard}:1: " in text and f"{hard}:7: " in text and "more (run.json)" not in text
    data = prepared(tiny_llama, rows, val={"long": long}, max_length=140, overlong="truncate")
    assert data.summary()["val_truncated"] == {"long": 1}
    assert "1 rows cut at 140 tokens (long)" in "\n".join(plan_lines(data.summary()))


def test_the_split_counts_every_lost_row_once(tiny_llama: Path, tmp_path: Path) -> None:
    bad = [{"messages": [{"role": "user", "content": "no answer"}]}] * 8
    file = write_jsonl(tmp_path / "rows.jsonl", bad + chat_rows(60))
    data = prepared(tiny_llama, file, val_fraction=0.3, bad_rows="skip", max_length=60, overlong="truncate")
    whole = prepared(tiny_llama, file, val_fraction=0.0, bad_rows="skip", max_length=60, overlong="truncate")
    summary, held = data.summary(), data.val_selections["val"]
    assert whole.selection.truncated == summary["truncated"] + summary["val_truncated"]["val"] > summary["truncated"]
    assert held.truncated == int((whole.selection.lengths == 60).sum()) - int((data.selection.lengths == 60).sum())
    assert summary["val_dropped"] == {} and summary["dropped"]["bad rows skipped"] == 8
    assert summary["rows"] + len(held) + sum(summary["dropped"].values()) == summary["rows_read"] == 68
    lines = plan_lines(summary)
    assert sum(f"skipped {file}:" in line for line in lines) == 5 and "       and 3 more (run.json)" in lines


def test_the_plan_says_the_rows_tokens_and_the_runs(tiny_llama: Path, rows: Path) -> None:
    data = prepared(tiny_llama, rows, max_epochs=3, val_fraction=0.0, tokens_per_step=50)
    total, longest = int(data.selection.lengths.sum()), int(data.selection.lengths.max())
    first, plan = (next(s for s in plan_lines(data.summary()) if s.startswith(word)) for word in ("data", "plan"))
    assert f"60 rows to train on ({total:,} tokens, " in first
    assert longest > 50 and f"steps of up to {longest:,} tokens, 3 epochs ({3 * total:,} tokens, " in plan


def test_b4_all_rows_dropped_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"limit\.jsonl.*3 longer than 8 tokens.*max_length"):
        prepared(tiny_llama, long_and_short(tmp_path), max_length=8)
    with pytest.raises(UserError, match="nothing to train on"):
        prepared(tiny_llama, long_and_short(tmp_path), max_length=4, overlong="truncate")


def test_overlong_error_names_the_row(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"limit\.jsonl:2"):
        prepared(tiny_llama, long_and_short(tmp_path), max_length=64, overlong="error")


def test_a_row_over_the_budget_of_a_batch_is_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tokens_per_batch 100"):
        prepared(tiny_llama, long_and_short(tmp_path), tokens_per_batch=100)


# ---- i6: the split


def prompts(data: ChatData, selection: Any) -> list[str]:
    rows = {row.line: row.value for row in read_rows(data.train_files[0])}
    lines = [int(selection.name(i).rpartition(":")[2]) for i in range(len(selection))]
    return [json.dumps(rows[line]["messages"][:-1]) for line in lines]


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_i6_no_prompt_on_both_sides(train_on: Any, tiny_llama: Path, tmp_path: Path) -> None:
    once = [
        {"messages": [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": f"answer {i}"}]}
        for i in range(50)
    ]
    twice = [{"messages": [row["messages"][0], {"role": "assistant", "content": "another"}]} for row in once]
    file = write_jsonl(tmp_path / "rows.jsonl", once + twice + once[:10])
    data = prepared(tiny_llama, file, val_fraction=0.2, train_on=train_on)
    train, val = prompts(data, data.selection), prompts(data, data.val_selections["val"])
    assert len(train) + len(val) == 110 and 16 <= len(val) <= 22
    assert not set(train) & set(val)


def test_i6_raw_text_rows_are_split_too(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", template=None)
    file = write_jsonl(tmp_path / "text.jsonl", [{"text": f"the same beginning, then {i % 40}"} for i in range(60)])
    data = prepared(model, file, val_fraction=0.1)
    train, val = (
        {tuple(s.read(i)[0].tolist()) for i in range(len(s))} for s in (data.selection, data.val_selections["val"])
    )
    assert 4 <= len(data.val_selections["val"]) <= 6 and not train & val


def test_i6_the_split_is_the_same_on_every_rank_and_in_every_process(tiny_llama: Path, rows: Path) -> None:
    script = (
        "import sys\nfrom litft import *\n"
        "data = ChatData(sys.argv[2], seed=int(sys.argv[3]))\n"
        "data.prepare(SFT(sys.argv[1], Full()), max_epochs=1, ranks=2, rank=1)\n"
        "s = data.val_selections['val']\nprint([s.name(i) for i in range(len(s))])"
    )
    names = []
    for rank, seed in ((0, 0), (1, 5)):
        s = prepared(tiny_llama, rows, ranks=2, rank=rank, seed=seed).val_selections["val"]
        names.append(str([s.name(i) for i in range(len(s))]))
    command = [sys.executable, "-c", script, str(tiny_llama), str(rows), "9"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ, PYTHONHASHSEED="3"))
    assert names[0] == names[1] == out.stdout.strip().splitlines()[-1]
    assert names[0].count("rows.jsonl") == 6


@pytest.mark.parametrize(("count", "fraction", "held"), [(19, 0.5, 0), (20, 0.1, 2), (60, 0.0, 0), (60, 0.3, 18)])
def test_size_of_the_held_out_part(count: int, fraction: float, held: int, tiny_llama: Path, tmp_path: Path) -> None:
    data = prepared(tiny_llama, write_jsonl(tmp_path / "n.jsonl", chat_rows(count)), val_fraction=fraction)
    assert sum(len(s) for s in data.val_selections.values()) == held
    assert len(data.selection) == count - held


def test_at_most_200_rows_are_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    data = prepared(tiny_llama, write_jsonl(tmp_path / "n.jsonl", chat_rows(2100)), val_fraction=0.5)
    assert len(data.val_selections["val"]) == 200


@pytest.mark.parametrize("bad", [0, 3])
def test_held_out_prompts_are_those_of_held_out_rows(bad: int, tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"  # two files, so that a line number alone names two rows
    first = [{"messages": [{"role": "user", "content": "no answer"}]}] * bad + chat_rows(30)
    write_jsonl(folder / "a.jsonl", first)
    write_jsonl(folder / "b.jsonl", chat_rows(30, seed=4))
    data = prepared(tiny_llama, folder, val_fraction=0.2, bad_rows="skip")
    assert data.summary()["rows_read"] == 60 + bad
    tokenizer = tiny_tokenizer()

    def beginnings(selection: Any) -> set[str]:
        texts = [tokenizer.decode(selection.read(i)[0]) for i in range(len(selection))]
        return {text.partition("<|im_start|>assistant")[0] for text in texts}

    found = data.held_out_prompts(5)
    texts = {tokenizer.apply_chat_template(c.messages, tokenize=False) for c in found}
    assert len(texts) == 5
    assert texts <= beginnings(data.val_selections["val"]) and not texts & beginnings(data.selection)


# ---- loaders


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("packing", [True, False])
def test_ranks_hand_out_every_row_once(ranks: int, packing: bool, tiny_llama: Path, rows: Path) -> None:
    options: dict[str, Any] = {"packing": packing, "tokens_per_step": 700, "tokens_per_batch": 300, "val_fraction": 0.2}
    data = [prepared(tiny_llama, rows, ranks=ranks, rank=rank, **options) for rank in range(ranks)]
    trained = tokens_seen = 0
    for steps in zip(*[d.train_dataloader(0, 0) for d in data], strict=True):
        assert len({len(step["micro_batches"]) for step in steps}) == 1
        assert len({tuple(step["rows"]) for step in steps}) == 1
        batches = [batch for step in steps for batch in step["micro_batches"]]
        assert sum(batch["trained"] for batch in batches) == steps[0]["trained"]
        assert sum(batch["tokens"] for batch in batches) == steps[0]["tokens"]
        assert {float(batch["denominator"]) for batch in batches} == {np.float32(steps[0]["trained"] / ranks)}
        trained, tokens_seen = trained + steps[0]["trained"], tokens_seen + steps[0]["tokens"]
    selection = data[0].selection
    assert (trained, tokens_seen) == (selection.trained.sum(), selection.lengths.sum())
    val = [batch for d in data for batch in d.val_dataloader()[0]]
    assert sum(batch["trained"] for batch in val) == data[0].val_selections["val"].trained.sum()
    assert len({len(d.val_dataloader()[0]) for d in data}) == 1


@pytest.mark.parametrize("words", [(1, 9), (9, 1)])
def test_b3_a_true_eos_in_a_padded_batch_is_seen_and_trained(words: tuple[int, int], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    tokenizer.save_pretrained(model)
    ask, more = {"role": "user", "content": "why?"}, {"role": "user", "content": "and?"}
    rows = [
        [ask, {"role": "assistant", "content": "so"}, more, {"role": "assistant", "content": "sun " * n + "."}]
        for n in words
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages} for messages in rows])
    data = prepared(model, file, packing=False, val_fraction=0.0, tokens_per_step=400)
    (step,) = data.train_dataloader(0, 0)
    (batch,) = step["micro_batches"]
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = [tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in rows]
    shape = (2, max(map(len, expected)))
    assert tuple(batch["input_ids"].shape) == shape and len(set(map(len, expected))) == 2
    real = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert sorted(real) == sorted(expected)  # every true end of turn is attended to, also in the middle
    assert batch["attention_mask"].sum() == sum(map(len, expected))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == eos).all()
    row, column = batch["target_rows"].numpy(), batch["kept_columns"][batch["target_columns"]].numpy()
    assert (batch["attention_mask"].numpy()[row, column + 1] == 1).all(), "padding is never a target"
    assert (batch["input_ids"].numpy()[row, column + 1] == batch["target_ids"].numpy()).all()
    assert int((batch["target_ids"] == eos).sum()) == 4  # both answers of both rows learn to stop


def test_a_loader_starts_where_it_is_told_and_again(tiny_llama: Path, rows: Path) -> None:
    data = prepared(tiny_llama, rows, tokens_per_step=500)
    whole = [step["rows"] for step in data.train_dataloader(0, 0)]
    late = data.train_dataloader(0, 3)
    assert [step["rows"] for step in late] == [step["rows"] for step in late] == whole[3:]
    assert len(late) == len(whole) == len(data.plan.steps(0))
    workers = ChatData(str(rows), tokens_per_step=500, num_workers=2).prepare(
        SFT(str(tiny_llama), Full()), max_epochs=1
    )
    assert [step["rows"] for step in workers.train_dataloader(0, 3)] == whole[3:]


def test_a_mix_of_files_and_the_summary(tiny_llama: Path, tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", chat_rows(20))
    b = write_jsonl(tmp_path / "b.jsonl", chat_rows(30, seed=9))
    data = prepared(tiny_llama, [str(a), str(b)], weights=[2.0, 0.5], val_fraction=0.0, tokens_per_step=800)
    summary = data.summary()
    used = np.concatenate(data.plan.steps(0))
    assert np.bincount(used, minlength=50)[:20].tolist() == [2] * 20
    assert np.bincount(used, minlength=50)[20:].sum() == 15
    assert summary["rows"] == 50 and summary["steps"] == len(data.plan.steps(0)) and summary["epochs"] == 1.0
    assert summary["tokens"] == data.selection.lengths[used].sum()
    assert summary["trained_tokens"] == data.selection.trained[used].sum()


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 1.0], [0.0, 0.0], [0.001, 0.001]])
def test_weights_that_cannot_be_are_refused(weights: list[float], tiny_llama: Path, tmp_path: Path) -> None:
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(20))) for name in "ab"]
    with pytest.raises(UserError, match="weights"):
        prepared(tiny_llama, files, weights=weights)


def test_padding_where_the_model_cannot_pack(tiny_llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SFT, "cannot_pack", "it keeps a state along the row")
    data = prepared(tiny_llama, rows)
    assert data.summary()["cannot_pack"] == "it keeps a state along the row" and not data.plan.packing
    assert "attention_mask" in next(iter(data.train_dataloader(0, 0)))["micro_batches"][0]


@pytest.mark.slow
def test_a_large_file_is_prepared_in_little_memory(tmp_path: Path) -> None:
    """50k rows in a process of its own: what preparing adds to its memory, and the time from the cache."""
    model = save_tiny(tmp_path / "model")
    few = chat_rows(500)
    write_jsonl(tmp_path / "big.jsonl", few * 100)
    script = (
        "import sys, time, resource\nfrom litft import *\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "method = SFT(sys.argv[1], Full()); method.tokenizer, method.cannot_pack\n"
        "before, start = peak(), time.monotonic()\n"
        "ChatData(sys.argv[2]).prepare(method, max_epochs=1)\n"
        "print(peak() - before, time.monotonic() - start)"
    )
    command = [sys.executable, "-c", script, str(model), str(tmp_path / "big.jsonl")]
    (first, _), (again, cached) = (
        map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:])
        for _ in range(2)
    )
    assert first < 300 and again < 300, "MB"
    assert cached < 10, "seconds"
