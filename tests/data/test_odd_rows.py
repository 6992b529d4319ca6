"""What was decided about rows that are odd but whole, a test for each decision."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from templates_helpers import TOOLS, assistant, call, chat, stock, tokenizer, user
from tiny import chat_rows, write_jsonl

from litft.data.rows import conversations, to_conversation
from litft.data.template import CHATML, ChatEncoder, Encoded
from litft.errors import DataError

TEMPLATES = {"chatml": CHATML, **{name: stock(name) for name in ("llama3", "qwen2_5", "qwen3", "gptoss", "lfm2_2_5")}}


def encoder(name: str) -> ChatEncoder:
    tok = tokenizer()
    tok.chat_template = TEMPLATES[name]
    return ChatEncoder(tok)


def trained(encoded: Encoded) -> str:
    return tokenizer().decode([i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t])


# ---- empty texts


@pytest.mark.parametrize("nothing", ["", None, [], [{"type": "text", "text": ""}], " \n"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_empty_text_of_a_user_is_kept(name: str, nothing: Any) -> None:
    row = {"messages": [{"role": "user", "content": nothing}, {"role": "assistant", "content": "Ahoy!"}]}
    conversation = to_conversation(row)
    said = nothing if isinstance(nothing, str) else ""
    assert conversation.messages == [user(said), assistant("Ahoy!")]
    encoded = encoder(name)(conversation)
    assert encoded.ids == tokenizer().apply_chat_template(conversation.messages)["input_ids"]
    assert "Ahoy!" in trained(encoded)


INST = (  # an answer has no header that could be looked for
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_the_turn_of_an_empty_text_is_not_trained(nothing: str) -> None:
    for template, end in ((CHATML, "<|im_end|>"), (stock("llama3"), "<|eot_id|>"), (INST, "</s>")):
        tok = tokenizer()
        tok.chat_template = template
        row = chat(user("Hi?"), assistant("One."), user(nothing), assistant("Two."), user(nothing), assistant("Three."))
        space = " " if template == INST else ""
        assert trained(ChatEncoder(tok)(row)) == "".join(f"{space}{text}.{end}" for text in ("One", "Two", "Three"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "completion": "Ahoy!"},
        {"instruction": "", "output": "Ahoy!"},
        {"conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "Ahoy!"}]},
        {"messages": [{"role": "system", "content": ""}, user(""), assistant("Ahoy!")]},
    ],
    ids=["prompt", "instruction", "human", "system"],
)
def test_an_empty_question_is_kept_in_every_form(row: dict[str, Any]) -> None:
    messages = to_conversation(row).messages
    assert [m["content"] for m in messages] == [""] * (len(messages) - 1) + ["Ahoy!"]
    assert encoder("chatml")(to_conversation(row)).ids == tokenizer().apply_chat_template(messages)["input_ids"]


CALL = call("get_weather", {"city": "Paris"})


@pytest.mark.parametrize("nothing", ["", None, " \n\t", [], "\u2028\u00a0", "\x1f"])
def test_an_empty_answer_is_bad_unless_it_calls_or_reasons(nothing: Any) -> None:
    def row(**more: Any) -> dict[str, Any]:
        return {"messages": [user("Hi?"), {"role": "assistant", "content": nothing, **more}], "tools": TOOLS}

    for none in ({}, {"tool_calls": []}, {"reasoning_content": ""}, {"tool_calls": None, "reasoning": None}):
        with pytest.raises(
            DataError, match=r"^f:3: message 2 \(assistant\) is empty; give it text, or leave the row out"
        ):
            to_conversation(row(**none), "f", 3)
    encode = encoder("qwen3")
    assert '"city": "Paris"' in trained(encode(to_conversation(row(tool_calls=[CALL]))))
    assert "Because." in trained(encode(to_conversation(row(reasoning_content="Because."))))
    said = nothing if isinstance(nothing, str) else ""
    for bad in ({"prompt": "a", "completion": said}, {"instruction": "a", "output": said}, {"text": said}):
        with pytest.raises(DataError, match=r"^f:3: the (completion|output|text) is empty; give it text"):
            to_conversation(bad, "f", 3)


def test_an_answer_before_reasoning_inside_the_text_is_not_empty() -> None:
    row = chat(user("Hi?"), assistant("One.<think></think>"))
    assert trained(encoder("chatml")(row)) == "One.<think></think><|im_end|>"
    with pytest.raises(DataError, match="empty but for reasoning, which the chat template leaves out"):
        encoder("qwen3")(chat(user("Hi?"), row.messages[1], user("More?"), assistant("Two.")))


def test_arguments_nested_beyond_reason_are_an_error() -> None:
    for depth in (100, 3000):
        arguments: Any = "x"
        for _ in range(depth):
            arguments = {"k": arguments}
        tok = tokenizer()
        tok.chat_template = stock("deepseekv3")
        row = chat(user("Go"), assistant("", tool_calls=[call("f", arguments)]))
        if depth == 100:
            assert '{"k": "x"}' in trained(ChatEncoder(tok)(row))
            continue
        with pytest.raises(DataError, match=r"^chats.jsonl:7: .*(too deeply|recursion)"):
            ChatEncoder(tok)(row)


@pytest.mark.parametrize("unseen", ["\u200b", "\u202e", "\ufeff", "\0"])
def test_an_answer_of_what_cannot_be_seen_is_not_empty(unseen: str) -> None:
    conversation = to_conversation({"messages": [user("Hi?"), assistant(unseen)]})
    assert trained(encoder("chatml")(conversation)) == unseen + "<|im_end|>"


# ---- characters

HALVES = [r"\ud800", r"a\udfffb", r"\ude00\ud83d", r"\ud83d\ud83d\ude00"]
PLACES = [  # a row, X in the place of the text
    '{"messages": [{"role": "user", "content": "X"}, {"role": "assistant", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "X"}]}',
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "X"}]}, {"role": "gpt", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "content": "b", "thinking": "X"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "gpt", "tool_calls": [{"name": "X"}]}]}',
    '{"messages": [{"role": "gpt", "tool_calls": [{"name": "f", "arguments": {"k": "X"}}]}]}',
    '{"messages": [{"role": "gpt", "tool_calls": [{"name": "f", "arguments": {"X": 1}}]}]}',
    '{"messages": [{"role": "gpt", "content": "b"}, {"role": "tool", "content": "X", "name": "f"}]}',
    '{"messages": [{"role": "gpt", "content": "b"}, {"role": "tool", "content": {"k": "X"}}]}',
    '{"messages": [{"role": "gpt", "content": "b"}, {"role": "tool", "content": "a", "name": "X"}]}',
    '{"messages": [{"role": "gpt", "content": "b"}], "tools": [{"name": "f", "description": "X"}]}',
    '{"messages": [{"role": "gpt", "content": "b"}], "system": "X"}',
    '{"conversations": [{"from": "human", "value": "X"}, {"from": "gpt", "value": "b"}]}',
    '{"instruction": "a", "input": "X", "output": "b"}',
    '{"instruction": "a", "output": "b", "history": [["X", "b"]]}',
    '{"prompt": "a", "completion": "X"}',
    '{"text": "X"}',
]


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_a_lone_surrogate_is_bad_wherever_it_stands(place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(place.replace("X", half) for half in (*HALVES, r"\ud83d\ude00")))
    *bad, whole = conversations(str(path))
    assert all(isinstance(error, DataError) for error in bad) and len(bad) == len(HALVES)
    for line, error in enumerate(bad, 1):
        assert str(error).startswith(f"{path}:{line}: lone surrogate in "), error
        str(error).encode()  # can be printed
    assert not isinstance(whole, DataError)
    assert "\U0001f600" in json.dumps([whole.messages, whole.tools, whole.text], ensure_ascii=False)  # a pair is whole


ODD = [
    "a\0b",
    "\0",
    "\u05e9\u05dc\u05d5\u05dd abc \u202eright to left\u202c \u200f\u061c",
    "zero\u200bwidth\u200c\u200d\u2060\ufeff",
    "\ufeffmark in front",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301 \u00e9 \ufb01 \u212b",  # not normalised
    "\x01\x07\x08\x1b[31m\x7f\u0080\u009f",
    "line\u2028paragraph\u2029next\u0085",
    "\ufffd\uffff\U0010ffff\U000f0000\ue000",
    "\u202a\u202b\u2066\u2069\u00ad\u180e\u3164",
]


@pytest.mark.parametrize("ending", ["jsonl", "escaped.jsonl", "json", "csv", "parquet"])
def test_odd_characters_are_kept_byte_for_byte(ending: str, tmp_path: Path) -> None:
    """Through file, reader, template, tokens and back."""
    path = tmp_path / f"a.{ending}"
    rows = [{"prompt": text, "completion": f"{text}!{text}"} for text in ODD]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        ascii = ending == "escaped.jsonl"
        texts = [json.dumps(row, ensure_ascii=ascii) for row in rows]
        path.write_bytes(("[" + ",".join(texts) + "]" if ending == "json" else "\n".join(texts)).encode())
    found = list(conversations(str(path)))
    encode, decode = encoder("chatml"), tokenizer().decode
    for row, conversation in zip(rows, found, strict=True):
        assert not isinstance(conversation, DataError), conversation
        encoded = encode(conversation)
        whole = "".join(
            f"<|im_start|>{role}\n{text}<|im_end|>\n"
            for role, text in (("user", row["prompt"]), ("assistant", row["completion"]))
        )
        assert decode(encoded.ids).encode() == whole.encode()
        assert trained(encoded).encode() == f"{row['completion']}<|im_end|>".encode()


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_loses_an_odd_character(name: str) -> None:
    """Also where the template trims: none of these is a blank."""
    for text in (text for text in ODD if text == text.strip()):
        row = chat(user(text), assistant(text))
        encoded = encoder(name)(row)
        assert encoded.ids == tokenizer().apply_chat_template(row.messages)["input_ids"]
        assert text in trained(encoded)
        assert tokenizer().decode(encoded.ids).count(text) == 2 if text != "\0" else True


# ---- size


def test_a_run_of_blanks_that_the_tokenizer_cannot_split_is_an_error() -> None:
    row = chat(user("x" + " " * 11_000_000 + "y"), assistant("Ahoy!"))
    for run in (encoder("chatml"), encoder("chatml").prompt):
        with pytest.raises(
            DataError, match=r"^chats.jsonl:7: the tokenizer fails at this row: .*; split the row, or leave"
        ):
            run(row)
    row.text, row.messages = row.messages[0]["content"], []
    with pytest.raises(DataError, match=r"^chats.jsonl:7: the tokenizer fails at this row"):
        encoder("chatml")(row)


def big_rows(scale: float) -> dict[str, list[dict[str, str]]]:
    """By name: rows of `scale` times 10 MB, and one of `scale` times 100,000 messages."""
    size = int(10_000_000 * scale)
    return {
        "question": [user("w\u00e9 <|im_end|>" * (size // 14)), assistant("so it is")],  # forged tokens: encoded twice
        "answer": [user("why"), assistant("so it is, " * (size // 10))],
        "messages": [(assistant if i % 2 else user)(f"message {i}") for i in range(int(100_000 * scale))],
    }


def outcomes(model: str, file: str) -> dict[str, Any]:
    """By `overlong`: rows, what was dropped, how many were cut, and the longest that is left; or the error."""
    from litft import SFT, ChatData

    method, said = SFT(model), {}
    for overlong in ("drop", "truncate", "error"):
        try:
            data = ChatData(file, overlong=overlong, val_fraction=0.0).prepare(method, max_epochs=1)  # type: ignore
            found = data.summary()
            longest = int(data.selection.lengths.max())
            said[overlong] = [found["rows"], found["dropped"], found["truncated"], longest]
        except DataError as error:
            said[overlong] = str(error)
    return said


MEASURED = """
import json, resource, sys, time
begin = time.perf_counter()
from test_odd_rows import outcomes
said = outcomes(*sys.argv[1:])
status = open("/proc/self/status").read()  # ru_maxrss would count what the parent had before exec
own = int(status.partition("VmHWM:")[2].split()[0]) / 1e6
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
print(json.dumps([said, time.perf_counter() - begin, own, children]))
"""


@pytest.mark.parametrize("scale", [0.03, pytest.param(1.0, marks=pytest.mark.slow)], ids=["small", "full"])
@pytest.mark.parametrize("name", big_rows(0))
def test_a_big_row_follows_overlong(
    name: str, scale: float, tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full size in under 60 s and 4 GB, imports and all, in a process of its own."""
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    rows = chat_rows(30)
    rows.insert(3, {"messages": big_rows(scale)[name]})
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    if scale < 1:
        said = outcomes(str(tiny_llama), str(file))
    else:
        command = [sys.executable, "-c", MEASURED, str(tiny_llama), str(file)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        said, seconds, own, children = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {file.stat().st_size:,} bytes, {seconds:.1f} s, {own:.2f} GB, in workers {children:.2f} GB")
        assert seconds < 60 and own < 4 and children < 4
    assert said["drop"][:3] == [30, {"longer than 512 tokens": 1}, 0]
    if name == "question":  # the cut leaves nothing of the answer
        assert said["truncate"][:3] == [30, {"nothing to train on within the limit": 1}, 0]
    else:
        assert said["truncate"] == [31, {}, 1, 512]
    assert re.search(r"rows\.jsonl:4: \d{5,} tokens, over the limit of 512; raise --data.max_length", said["error"])
