import copy
import json
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litft.data.conversation import Conversation
from litft.data.files import read_rows
from litft.data.rows import check, conversations, schema_of, to_conversation
from litft.errors import DataError, UserError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "SF"}}}


def turns(value):
    return to_conversation(value, "f.jsonl", 1).messages


def chat(*messages, **more):
    return {"messages": list(messages), **more}


# ---- every form

FORMS = [  # form, row, messages
    ("messages", chat(USER, ANSWER, id=7, meta={"a": None}), [USER, ANSWER]),
    ("messages", [USER, ANSWER], [USER, ANSWER]),
    ("messages", {"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
    ("messages", chat(USER, ANSWER, text="x", prompt="y", conversations=None), [USER, ANSWER]),
    ("messages", chat(USER, ANSWER, label="spam"), [USER, ANSWER]),
    ("messages", chat(USER, ANSWER, system="s"), [{"role": "system", "content": "s"}, USER, ANSWER]),
    (
        "messages",
        chat({"role": "system", "content": "s"}, ANSWER, system="s"),
        [{"role": "system", "content": "s"}, ANSWER],
    ),
    ("messages", chat(ANSWER, USER, USER), [ANSWER, USER, USER]),
    (
        "messages",
        chat(USER, {"role": "system", "content": "mid"}, ANSWER),
        [USER, {"role": "system", "content": "mid"}, ANSWER],
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": ""},
        [USER, ANSWER],
    ),
    ("sharegpt", {"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    ("sharegpt", [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], [USER, ANSWER]),
    ("alpaca", {"instruction": "hi", "input": "", "output": "hello", "text": "..."}, [USER, ANSWER]),
    ("alpaca", {"instruction": "hi", "output": "hello", "system": None, "history": []}, [USER, ANSWER]),
    (
        "alpaca",
        {"instruction": "Add.", "input": "1 2", "output": "3", "system": "s", "history": [["hi", "hello"]]},
        [
            {"role": "system", "content": "s"},
            USER,
            ANSWER,
            {"role": "user", "content": "Add.\n1 2"},
            {"role": "assistant", "content": "3"},
        ],
    ),
    ("alpaca", {"instruction": "", "input": "hi", "output": "hello", "history": "[]"}, [USER, ANSWER]),
    ("prompt-completion", {"prompt": "hi", "completion": "hello"}, [USER, ANSWER]),
    ("prompt-completion", {"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
    ("prompt-completion", {"prompt": USER, "completion": ANSWER}, [USER, ANSWER]),
    ("prompt-completion", {"prompt": [USER], "completion": "hello"}, [USER, ANSWER]),
]


@pytest.mark.parametrize(("schema", "row", "messages"), FORMS, ids=range(len(FORMS)))
def test_every_form_comes_to_the_same_messages(schema, row, messages):
    before = copy.deepcopy(row)
    assert schema_of(row) == schema
    conversation = to_conversation(row, "f.jsonl", 3)
    assert conversation.messages == messages
    assert len(conversation.train) == len(messages)
    assert (conversation.text, conversation.file, conversation.line) == (None, "f.jsonl", 3)
    assert row == before


def test_a_text_row():
    assert schema_of({"text": "a "}) == "text"
    assert to_conversation({"text": "a ", "url": "x"}, "f", 2) == Conversation(text="a ", file="f", line=2)


def test_b16_role_aliases_are_the_roles():
    shared = [
        {"from": name, "value": "x"}
        for name in ("system", "human", "gpt", "observation", "function", "tool", "developer")
    ]
    assert [m["role"] for m in turns({"conversations": shared})] == [
        "system", "user", "assistant", "tool", "tool", "tool", "system",
    ]  # fmt: skip
    assert turns(chat({"role": "User", "content": "hi"}, {"role": "model", "content": "hello"})) == [USER, ANSWER]
    with pytest.raises(DataError, match=r'^f\.jsonl:9: unknown role "asistant" in message 2; did you mean assistant\?'):
        to_conversation(chat(USER, {"role": "asistant", "content": "x"}), "f.jsonl", 9)
    with pytest.raises(DataError, match=r'unknown role "narrator" in message 1; use system, user, assistant or tool$'):
        turns(chat({"role": "narrator", "content": "x"}))


CALL_SPELLINGS = [
    {"tool_calls": [CALL]},
    {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "SF"}'}}]},
    {"tool_calls": [{"name": "weather", "arguments": {"city": "SF"}}]},
    {"tool_calls": json.dumps([CALL])},
    {"function_call": {"name": "weather", "arguments": '{"city": "SF"}'}, "tool_calls": None},
]


@pytest.mark.parametrize("call", CALL_SPELLINGS)
def test_b10_arguments_are_always_an_object(call):
    expected = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert turns(chat(USER, {"role": "assistant", "content": None, **call}))[1] == expected


@pytest.mark.parametrize("value", [CALL["function"], json.dumps(CALL["function"]), json.dumps([CALL["function"]])])
def test_b10_a_function_call_turn_is_an_assistant_turn(value):
    row = {"conversations": [{"from": "function_call", "value": value}, {"from": "observation", "value": '{"t": 5}'}]}
    assert turns(row) == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 5}'},
    ]


@pytest.mark.parametrize(("arguments", "read"), [("", {}), (None, {}), ("{}", {}), ({"x": None}, {"x": None})])
def test_b10_no_arguments_and_null_arguments(arguments, read):
    row = chat({"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]})
    assert turns(row)[0]["tool_calls"][0]["function"]["arguments"] == read


def test_b9_nothing_of_the_tools_is_lost():
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}, "strict": True}]
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]},
        {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"},
        ANSWER,
    ]
    for offered in (tools, json.dumps(tools)):
        conversation = to_conversation({"messages": messages, "tools": offered})
        assert (conversation.messages, conversation.tools) == (messages, tools)
    bare = {"name": "weather", "parameters": {}}
    for key in ("tools", "functions"):
        assert to_conversation(chat(USER, ANSWER, **{key: [bare]})).tools == [{"type": "function", "function": bare}]
    for none in (None, [], "", "[]"):
        assert not to_conversation(chat(USER, ANSWER, tools=none)).tools
    assert turns(chat(ANSWER, {"role": "tool", "content": {"t": "é"}}))[1]["content"] == '{"t": "é"}'


def test_b11_null_content_is_empty():
    message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert turns(chat(USER, message)) == turns(chat(USER, {**message, "content": ""}))
    assert turns(chat({"role": "user", "content": None}, ANSWER))[0]["content"] == ""


def test_i8_parts_equal_the_string():
    parts = [{"type": "text", "text": "he"}, "l", {"text": "lo"}, {"type": "text", "text": "", "image_url": None}]
    assert turns(chat(USER, {"role": "assistant", "content": parts})) == [USER, ANSWER]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_of_any_name(key):
    expected = {**ANSWER, "reasoning_content": "why"}
    assert turns(chat(USER, {**ANSWER, key: "why"}))[1] == expected
    parts = [{"type": "thinking", "thinking": "why"}, {"type": "text", "text": "hello"}]
    assert turns(chat(USER, {"role": "assistant", "content": parts}))[1] == expected
    assert turns(chat(USER, {**ANSWER, key: ""}))[1] == ANSWER
    assert turns(chat(USER, {"role": "assistant", "content": "", key: "why"}))[1]["content"] == ""


def test_train_flags():
    flags = [{}, {"train": False}, {"trainable": True}, {"weight": 0}, {"weight": 1.0}, {"train": None, "weight": 1}]
    assert to_conversation(chat(*({**ANSWER, **flag} for flag in flags))).train == [
        None,
        False,
        True,
        False,
        True,
        True,
    ]
    assert to_conversation(chat(USER, ANSWER, system="s")).train == [None, None, None]
    # answers that are given in the prompt are not what the row teaches
    row = {"prompt": [USER, ANSWER, {**ANSWER, "train": True}, USER], "completion": [ANSWER]}
    assert to_conversation(row).train == [None, False, True, None, None]


def test_text_is_kept_to_the_character():
    text = " \x00\u202e\u200b\ufeff\u2028\r\n\U0001f600e\u0301 "
    assert [
        m["content"] for m in turns(chat({"role": "user", "content": text}, {"role": "assistant", "content": text}))
    ] == [text] * 2
    assert turns(chat({"role": "user", "content": ""}, ANSWER))[0]["content"] == ""


@pytest.fixture(scope="module")
def render():
    """A stock template of the field, rendered by transformers."""
    trl = pytest.importorskip("trl")
    from transformers.utils.chat_template_utils import render_jinja_template

    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()

    def rendered(row):
        conversation = to_conversation(row)
        [text], _ = render_jinja_template([conversation.messages], conversation.tools, chat_template=template)
        return text

    return rendered


def test_b10_b11_b16_other_spellings_render_alike(render):
    rows = [chat(USER, {"role": "assistant", "content": None, **call}) for call in CALL_SPELLINGS]
    value = json.dumps(CALL["function"])
    rows.append({"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": value}]})
    rows.append(
        chat({"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"role": "model", "function_call": CALL})
    )
    texts = {render(row) for row in rows}
    assert len(texts) == 1
    (text,) = texts
    assert '{"city": "SF"}' in text
    assert "None" not in text


def test_i2_rendered_arguments_are_those_of_the_row_alone(render, tmp_path):
    calls = [{"x": 1}, {"city": "SF", "t": "a"}, {"t": "5"}]
    rows = [chat(USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": a}]}) for a in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for arguments, row in zip(calls, read_rows(str(tmp_path / "a.parquet")), strict=True):
        assert f'"arguments": {json.dumps(arguments)}' in render(row.value)


# ---- bad rows

PARTS = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x.png"}}]
BAD = [  # a row, and what is said of it
    (7, "a row must be an object, not a number; write"),
    (None, "a row must be an object, not null; write"),
    ("hello", 'a row must be an object, not a string; write {"text": ...} around plain text\n    "hello"'),
    (True, "a row must be an object, not true or false; write"),
    ({}, "the row is empty: {}; leave it out"),
    ([1, 2], "a list of messages must hold objects with a role, not a number"),
    ([chat(USER, ANSWER)], "a list of rows, not a row; write one row on a line, or name the file .json"),
    (USER, 'a single message, not a row; write {"messages": [...]} around the messages of a row'),
    (
        {"data": [chat(USER, ANSWER)]},
        "the rows stand in a list under the key data; make that list the whole of a .json file",
    ),
    (
        {"question": "a", "answer": "b"},
        "unknown form of row with the keys question, answer; "
        "nearest is prompt-completion (prompt, completion): rename question -> prompt, answer -> completion",
    ),
    (
        {"instruction": "a", "input": "b", "response": "c"},
        "unknown form of row with the keys instruction, input, response; "
        "nearest is alpaca (instruction, output): rename response -> output",
    ),
    (
        {"mesages": [USER]},
        "unknown form of row with the keys mesages; nearest is messages (messages): rename mesages -> messages",
    ),
    (
        {"prompt": "a", "chosen": "b"},
        "unknown form of row with the keys prompt, chosen; nearest is preference (chosen, rejected): add rejected",
    ),
    (
        {"messages": None},
        "unknown form of row with the keys messages; nearest is messages (messages): fill what is null",
    ),
    ({"k" * 500: 1}, "unknown form of row with the keys kkkk"),
    ([], "the conversation is empty; leave the row out"),
    (chat(), "the conversation is empty; leave the row out"),
    ({"conversations": []}, "the conversation is empty; leave the row out"),
    ({"messages": {"role": "user"}}, "messages must be a list, not an object; write [{"),
    ({"messages": "hi"}, "messages: broken JSON at column 1: "),
    (chat("hi"), 'message 1 must be an object, not a string; write {"role": ..., "content": ...}\n    "hi"'),
    (chat(USER), "no assistant turn: nothing to learn from; add the answer, or leave the row out"),
    (chat({"content": "x"}), 'message 1 has no role; write {"role": ..., "content": ...}\n    {"content": "x"}'),
    (chat({"role": 3, "content": "x"}), "the role of message 1 must be a string, not a number"),
    (chat(USER, {"role": "robot", "content": "x"}), 'unknown role "robot" in message 2; '),
    (chat(USER, {"role": "x\n\x1b" * 99, "content": "x"}), 'unknown role "x\\n\\u001bx'),
    (chat({"role": "user", "text": "x"}, ANSWER), "message 1 (user) has no content (its keys: role, text); write"),
    (chat({"role": "user"}, ANSWER), "message 1 (user) has no content; write"),
    (
        chat({"role": "user", "content": 3}, ANSWER),
        "the content of message 1 (user) must be a string, not a number; write text\n    3",
    ),
    (
        chat({"role": "user", "content": {"a": 1}}, ANSWER),
        "the content of message 1 (user) must be a string, not an object",
    ),
    (chat({"role": "user", "content": "a", "value": "b"}, ANSWER), "message 1 (user) has both a content and a value"),
    (
        chat({"role": "user", "content": [3]}, ANSWER),
        "part 1 of the content of message 1 (user) must be an object, not a number",
    ),
    (
        chat({"role": "user", "content": PARTS}, ANSWER),
        "images are not supported yet: part 2 of the content of message 1 (user)",
    ),
    (
        chat({"role": "user", "content": [{"type": "image", "text": None}]}, ANSWER),
        "images are not supported yet: part 1",
    ),
    (chat({"role": "user", "content": [{"type": "input_audio"}]}, ANSWER), "audio is not supported yet: part 1"),
    (chat({"role": "user", "content": [{"type": "video_url"}]}, ANSWER), "videos are not supported yet: part 1"),
    (
        chat({"role": "user", "content": [{"type": "tool_result"}]}, ANSWER),
        "part 1 of the content of message 1 (user) is no text; write calls",
    ),
    (chat(USER, ANSWER, images=["a.png"]), "images are not supported yet: the row has 'images'; remove 'images'"),
    (chat({**USER, "image": "a.png"}, ANSWER), "images are not supported yet: message 1 (user) has 'image'"),
    (
        chat(USER, {"role": "assistant", "content": ""}),
        "message 2 (assistant) is empty; give it text, or leave the row out",
    ),
    (chat(USER, {"role": "assistant", "content": " \n"}), "message 2 (assistant) is empty"),
    (chat(USER, {"role": "assistant", "content": None, "tool_calls": []}), "message 2 (assistant) is empty"),
    (
        chat(USER, {"role": "assistant", "content": "a\ud800"}),
        "lone surrogate in the content of message 2 (assistant); "
        "write the whole character; half of it is not text\n    a\\ud800",
    ),
    (
        chat(USER, {**ANSWER, "reasoning": ["x"], "thinking": 1}),
        "thinking of message 2 (assistant) must be a string, not a number",
    ),
    (
        chat(USER, {**ANSWER, "reasoning": "x", "thinking": "y"}),
        "message 2 (assistant) has several different reasonings",
    ),
    (
        chat({**USER, "reasoning": "x"}, ANSWER),
        "message 1 (user) has reasoning_content; only assistant messages can have that",
    ),
    (
        chat({**USER, "tool_calls": [CALL]}, ANSWER),
        "message 1 (user) has tool_calls; only assistant messages can have that",
    ),
    (
        chat({**ANSWER, "tool_calls": [{"function": {}}]}),
        "tool call 1 of message 1 (assistant) names no function; write",
    ),
    (chat({**ANSWER, "tool_calls": ["x"]}), "tool call 1 of message 1 (assistant) names no function; write"),
    (
        chat({**ANSWER, "tool_calls": [{"name": "f", "arguments": "{x"}]}),
        "the arguments of f in message 1 (assistant): broken JSON at column 2: ",
    ),
    (
        chat({**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}),
        "the arguments of f in message 1 (assistant) must be an object, not a list",
    ),
    (
        chat({**ANSWER, "tool_calls": [{"name": "f", "arguments": '{"a": NaN}'}]}),
        "the arguments of f in message 1 (assistant): NaN is not JSON",
    ),
    (
        chat({**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": "\udfff"}}]}),
        "lone surrogate in the arguments of f",
    ),
    (
        chat({**ANSWER, "tool_calls": [{"name": "f", "arguments": {"a": b""}}]}),
        "the arguments of f in message 1 (assistant) is not JSON",
    ),
    (
        chat({**ANSWER, "tool_calls": [CALL], "function_call": {"name": "f"}}),
        "message 1 (assistant) has both tool_calls and function_call",
    ),
    (
        chat({**ANSWER, "tool_calls": [{**CALL, "id": 5}]}),
        "the id of tool call 1 of message 1 (assistant) must be a string, not a number",
    ),
    (
        {"conversations": [{"from": "function_call", "value": "f(x)"}]},
        "the tool call of message 1 (function_call): broken JSON",
    ),
    (chat(USER, ANSWER, tools="[{"), "tools: broken JSON at column 3"),
    (chat(USER, ANSWER, tools={"a": 1}), "tools must be a list, not an object"),
    (chat(USER, ANSWER, tools=["f"]), 'tool 1 is not the schema of a function; write {"type": "function"'),
    (chat(USER, ANSWER, tools=[{"type": "function"}]), "tool 1 is not the schema of a function"),
    (chat(USER, {**ANSWER, "train": "no"}), 'train of message 2 (assistant) is "no"; write true or false'),
    (chat(USER, {**ANSWER, "weight": 0.5}), "weight of message 2 (assistant) is 0.5; write 0 or 1"),
    (chat(USER, {**ANSWER, "weight": 1, "train": False}), "message 2 (assistant) says both to train it and not to"),
    (
        chat({"role": "system", "content": "a"}, ANSWER, system="b"),
        "two system prompts: the key system and a system message",
    ),
    (chat(USER, ANSWER, system=["x", 1]), "part 2 of system must be an object, not a number"),
    ({"instruction": "a", "output": ""}, "the output is empty; give it text, or leave the row out"),
    ({"instruction": 1, "output": "b"}, "instruction must be a string, not a number"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, "history must be a list of pairs [question, answer]"),
    ({"prompt": "a", "completion": " "}, "the completion is empty; give it text, or leave the row out"),
    ({"prompt": [ANSWER], "completion": [USER]}, "no assistant turn in the completion"),
    ({"prompt": 1, "completion": "b"}, "prompt messages must be a list, not a number"),
    ({"prompt": [USER], "completion": [{"role": "x"}]}, 'unknown role "x" in completion message 1'),
    ({"text": ""}, "the text is empty; give it text, or leave the row out"),
    ({"text": ["a"]}, "text must be a string, not a list; write a string"),
    ({"text": "\udc00"}, "lone surrogate in text"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "preference row (for dpo, orpo, simpo, cpo, reward), not for fine-tuning: it lacks messages; fine-tune with d",
    ),
    (
        {"conversations": [], "chosen": USER, "rejected": USER},
        "preference row (for dpo, orpo, simpo, cpo, reward), not for fine-tuning",
    ),
    (chat(USER, ANSWER, label=False), "kto row (for kto), not for fine-tuning: it lacks messages; fine-tune with kto"),
    ({"prompt": "a", "completion": "b", "label": "True"}, "kto row (for kto), not for fine-tuning"),
]


@pytest.mark.parametrize(("row", "said"), BAD, ids=range(len(BAD)))
def test_i8_a_bad_row_says_where_what_and_the_mend(row, said):
    with pytest.raises(DataError) as caught:
        to_conversation(row, "chat.jsonl", 12)
    error = caught.value
    assert str(error).startswith(f"chat.jsonl:12: {said}"), str(error)
    assert error.mend or error.snippet
    assert len(str(error).splitlines()) <= 5
    assert len(str(error)) < 500
    assert len(error.snippet) <= 80
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_row_nested_without_end_is_an_error():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for row in (
        {"messages": deep},
        chat({"role": "user", "content": deep}),
        chat({**USER, "content": [{"text": deep}]}),
    ):
        with pytest.raises(DataError):
            to_conversation(row)


# ---- anything at all

KEYS = [
    "messages",
    "conversations",
    "role",
    "from",
    "content",
    "value",
    "instruction",
    "output",
    "prompt",
    "completion",
]
KEYS += [
    "text",
    "chosen",
    "rejected",
    "label",
    "tools",
    "system",
    "history",
    "tool_calls",
    "function",
    "name",
    "arguments",
]
KEYS += ["reasoning", "train", "weight", "type", "images", "input", "id", "function_call"]
LEAVES = st.sampled_from(["user", "assistant", "gpt", "function_call", "tool", "text", "{}", "[]", "image"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | LEAVES | st.text(st.characters(codec=None), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": LEAVES, "content": JSON}, optional={key: JSON for key in KEYS if key not in ("role", "content")}
)


@settings(max_examples=80, deadline=None)
@given(
    JSON
    | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6)
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}, optional={"tools": JSON, "system": JSON})
)
def test_only_data_errors_leave_on_any_row(row):
    try:
        conversation = to_conversation(row, "f", 1)
    except DataError as error:
        assert str(error).startswith("f:1: ")
        assert len(error.snippet) <= 80
        assert (len(str(error).splitlines()), len(str(error)) < 700) <= (5, True)
        return
    assert schema_of(row) not in ("unknown", "preference", "kto")
    # what comes out is what chat templates take, and itself a good row
    json.dumps([conversation.messages, conversation.tools], allow_nan=False).encode()
    assert len(conversation.train) == len(conversation.messages)
    for message in conversation.messages:
        assert message["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(message["content"], str)
        for call in message.get("tool_calls", []):
            assert isinstance(call["function"]["arguments"], dict)
    if conversation.text is None:
        again = to_conversation({"messages": conversation.messages, "tools": conversation.tools})
        assert (again.messages, again.tools) == (conversation.messages, conversation.tools)


# ---- files of rows


def test_conversations_and_errors_come_in_order(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(chat(USER, ANSWER)), "{", json.dumps(chat(USER)), '{"text": "x"}']))
    good, broken, bad, text = conversations(str(path))
    assert (good.messages, good.file, good.line, text.text, text.line) == ([USER, ANSWER], str(path), 1, "x", 4)
    assert isinstance(broken, DataError)
    assert (broken.line, bad.line) == (2, 3)


def test_i2_parquet_rows_are_those_of_jsonl(tmp_path):
    calls = [{"x": 1}, {"city": "SF", "t": "a"}, {"t": "5"}]
    rows = [
        chat(USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": a}]}) for a in calls
    ]
    rows.append(chat(USER, {**ANSWER, "reasoning": "why", "train": False}, system="s"))
    rows[0]["system"] = None  # from_pylist takes the columns from the first row
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table, lines = (list(conversations(str(tmp_path / name))) for name in ("a.parquet", "a.jsonl"))
    assert [(c.messages, c.train) for c in table] == [(c.messages, c.train) for c in lines]
    assert not any(isinstance(c, DataError) for c in table)


def test_check_lists_counts_and_ends_with_the_sum(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = (
        [chat(USER, ANSWER)] * 3
        + [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
        + [chat(USER, ANSWER, label=True)]
    )
    path.write_text("\n".join(map(json.dumps, rows)) + "\nnot json\n" + json.dumps(chat(USER)))
    found = check(str(path))
    listed = [str(error) for error in found]
    assert re.match(f"{path}:7: broken JSON at column 1: .*; ", listed[0])
    assert listed[1] == f"{path}:8: no assistant turn: nothing to learn from; add the answer, or leave the row out"
    assert found.summary() == [
        "3 messages rows",
        "2 preference rows (for dpo, orpo, simpo, cpo, reward)",
        "1 kto row (for kto)",
        "8 rows, 2 bad",
    ]
    assert (found.rows, found.bad) == (8, 2)


def test_check_of_a_file_that_breaks_off(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "b"}, {"te')
    found = check(str(path))
    assert [str(error).splitlines()[0] for error in found] == [
        f"{path}:3: the array is not closed; its last element starts on line 1 of the file; "
        "the file is cut off, or a bracket or quote is not closed"
    ]
    assert found.summary()[-1] == "3 rows, 1 bad"
    with pytest.raises(UserError, match="no such file"):
        check(str(tmp_path / "none.jsonl"))
