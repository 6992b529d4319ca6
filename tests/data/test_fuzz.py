"""Generated rows through file, reader, template and mask: what is good comes out as transformers writes it, with the
answers trained and nothing else; what is not ends in one documented error that names the row."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generated_rows import Case, rows
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from templates_helpers import FAMILIES, SPECIAL, stock, tokenizer

from litft.data.conversation import Conversation
from litft.data.files import read_rows
from litft.data.rows import to_conversation
from litft.data.template import CHATML, ChatEncoder, Encoded
from litft.errors import DataError

INST = (  # an answer has no header; the question's end is all that stands before it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "inst": INST}
TEMPLATES |= {n: stock(n) for n in ("llama3", "qwen2_5", "qwen3", "gemma3", "gptoss", "deepseekv3", "lfm2_2_5")}
ENDS = {"chatml": ["<|im_end|>"], "inst": ["</s>"]}
ENDS |= {name: [e for e in (f.end, f.last, f.called) if e] for name, f in FAMILIES.items() if name in TEMPLATES}
GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
QWEN_TOOLS = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>LIST\n</tools>\n\nFor each function call, return a "
    "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
MARK = re.compile(r"Z[a-z]\d+Z")


@functools.cache
def encoder(name: str, allow: bool) -> ChatEncoder:
    tok = copy.deepcopy(tokenizer())
    tok.chat_template = TEMPLATES[name]
    return ChatEncoder(tok, allow_special_tokens=allow)


# ---- the judge: transformers itself, and three templates written out by hand


def oracle(encode: ChatEncoder, messages: list[dict], tools: list | None, name: str, **options: Any) -> str:
    messages = [{**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in messages]
    if name == "deepseekv3":  # which takes the arguments of calls as text
        messages = copy.deepcopy(messages)
        for call in (call for m in messages for call in m.get("tool_calls", ())):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return encode.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def by_hand(name: str, messages: list[dict], tools: list | None, wanted: list[bool]) -> Iterator[tuple[str, bool]]:
    """The text of four templates in parts: trained or not."""
    if name in ("llama3", "inst"):
        yield "<bos>", False
    if name == "qwen2_5":
        own = messages[0]["role"] == "system"
        system = (
            messages[0]["content"] if own else "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        )
        messages, wanted = messages[own:], wanted[own:]
        listed = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools or ())
        yield f"<|im_start|>system\n{system}{QWEN_TOOLS.replace('LIST', listed) if tools else ''}<|im_end|>\n", False
    roles = [m["role"] for m in messages] + [""]
    for i, message in enumerate(messages):
        role, content, calls = message["role"], message["content"], message.get("tool_calls", [])
        if name == "inst":
            user, end = role == "user", "</s>" if role == "assistant" else ""
            yield f"[INST] {content} [/INST]" if user else f" {content}{end}", wanted[i]
        elif name == "llama3":
            yield f"<|start_header_id|>{role}<|end_header_id|>\n\n", False
            yield content.strip() + "<|eot_id|>", wanted[i]
        elif name == "qwen2_5" and role == "tool":
            yield "<|im_start|>user" * (i == 0 or roles[i - 1] != "tool"), False
            yield f"\n<tool_response>\n{content}\n</tool_response>" + "<|im_end|>\n" * (roles[i + 1] != "tool"), False
        else:
            yield f"<|im_start|>{role}\n", False
            written = [content] if content or not calls else []
            for call in calls:
                arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                named = f'{{"name": "{call["function"]["name"]}", "arguments": {arguments}}}'
                written.append(f"<tool_call>\n{named}\n</tool_call>")
            yield "\n".join(written) + "<|im_end|>", wanted[i]
            yield "\n", False


def check_encoded(encoded: Encoded, chat: Conversation, name: str, allow: bool) -> None:
    """Hold ids and mask against the judge."""
    encode = encoder(name, allow)
    tok = encode.tokenizer
    if chat.text is not None:
        ids = tok(chat.text)["input_ids"]
        assert encoded.ids == ids + [tok.eos_token_id] * (ids[-1] != tok.eos_token_id) and all(encoded.trained)
        return
    messages, tools = chat.messages, chat.tools
    text = oracle(encode, messages, tools, name)
    assert encoded.text == text
    whole = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    forged = [m for m in messages if m["role"] != "assistant" and any(s in m["content"] for s in SPECIAL_TOKENS)]
    if allow or not forged:
        assert encoded.ids == whole["input_ids"]
    else:
        assert tok.decode(encoded.ids) == text
        tame = [{**m, "content": SPELLED.sub("x", m["content"])} if m in forged else m for m in messages]
        expected = tok(oracle(encode, tame, tools, name), add_special_tokens=False)["input_ids"]
        assert [i for i in encoded.ids if i in SPECIAL_IDS] == [i for i in expected if i in SPECIAL_IDS]
    check_mask(encoded, chat, name, whole["offset_mapping"] if encoded.ids == whole["input_ids"] else None, encode)


def check_mask(encoded: Encoded, chat: Conversation, name: str, offsets: Any, encode: ChatEncoder) -> None:
    messages, tok = chat.messages, encode.tokenizer
    wanted = [m["role"] == "assistant" and t is not False for m, t in zip(messages, chat.train, strict=True)]
    pairs = list(zip(encoded.ids, encoded.trained, strict=True))
    said, rest = (tok.decode([i for i, t in pairs if t is of]) for of in (True, False))
    found = [(mark, i) for i, message in enumerate(messages) for mark in MARK.findall(json.dumps(message))]
    owners = {mark: {i for other, i in found if other == mark} for mark, _ in found}
    for mark, (i, *others) in owners.items():
        if not others:  # no copy of the message made by chance
            assert encoded.text.count(mark) == (said if wanted[i] else rest).count(mark)
            # An answer may lose reasoning of earlier turns by the template's own rule; nobody else loses anything.
            assert mark in encoded.text or messages[i]["role"] == "assistant"
    ends = [i for (i, t), (_, after) in zip(pairs, [*pairs[1:], (0, False)], strict=True) if t and not after]
    assert {tok.convert_ids_to_tokens(i) for i in ends} <= {
        s for s in SPECIAL if any(e.endswith(s) for e in ENDS[name])
    }
    if offsets is None:
        return
    if name in ("chatml", "inst", "llama3", "qwen2_5"):
        parts = list(by_hand(name, messages, chat.tools, wanted))
        assert "".join(part for part, _ in parts) == encoded.text
        produced = "".join("1" if trained else "0" for part, trained in parts for _ in part)
        assert encoded.trained == ["1" in produced[begin:end] for begin, end in offsets]
    last = max(i for i, want in enumerate(wanted) if want)
    if last == 0 or messages[last - 1]["role"] == "assistant":
        return
    prompt = oracle(encode, messages[:last], chat.tools, name, add_generation_prompt=True)
    if prompt and encoded.text.startswith(prompt):  # the answer begins where the prompt of a served model ends
        at = len(prompt)
        assert all(t for (b, e), t in zip(offsets, encoded.trained, strict=True) if b <= at < e)
        assert not any(t for (b, e), t in zip(offsets, encoded.trained, strict=True) if b < at == e)


SPECIAL_IDS = set(tokenizer().all_special_ids)
SPECIAL_TOKENS = [tokenizer().convert_ids_to_tokens(i) for i in SPECIAL_IDS]
SPELLED = re.compile("|".join(map(re.escape, sorted(SPECIAL_TOKENS, key=len, reverse=True))))


# ---- the run of a row


def check_error(error: DataError, path: Path) -> None:
    text = str(error)
    assert error.file == str(path) and error.line and 2 <= error.line <= 4
    assert text.startswith(f"{path}:{error.line}: ") and error.what
    assert 1 <= len(text.splitlines()) <= 5 and len(text) < 900
    assert all(char.isprintable() or char == "\n" for char in text)


def check_read(chat: Conversation, case: Case) -> None:
    """A row that nobody spoiled is read as what it was made from, to the character."""
    assert (chat.text, chat.tools or None) == (case.text, case.tools)
    assert chat.messages == case.messages and chat.train == case.train


def must_be_valid(case: Case, name: str) -> bool:
    """Whether a row is good and the template writes all of its kind."""
    silent = any(m["role"] == "assistant" and not m["content"].strip() and "tool_calls" not in m for m in case.messages)
    able = case.text is not None or name == "qwen2_5" or (name in ("chatml", "llama3") and not case.tools)
    return not case.spoiled and able and not silent


def outcome(case: Case, path: Path, name: str, allow: bool) -> str:
    """`valid`, or where and why the row was refused."""
    good = json.dumps(GOOD).encode()
    lines = [good, case.body, good]
    path.write_bytes(b"[" + b",\n".join(lines) + b"]" if path.suffix == ".json" else b"\n".join(lines))
    first, *middle, last = read_rows(str(path))
    assert first.value == last.value == GOOD  # a bad row takes no other with it
    reasons = []
    for row in middle:
        at = "file"
        try:
            if row.error:
                raise row.error
            at = "row"
            chat = to_conversation(row.value, row.file, row.line)
            if not case.spoiled:
                check_read(chat, case)
            at = "template"
            encoded = encoder(name, allow)(chat)
        except DataError as error:
            check_error(error, path)
            what = re.split(r" at column| at line| at byte|: | \(|;", error.what)[0]
            reasons.append(f"{at}: " + re.sub(r"\d+|\".*\"|keys .*", "N", what)[:70])
        else:
            check_encoded(encoded, chat, name, allow)
    assert not (reasons and must_be_valid(case, name)), (reasons, case)
    return reasons[0] if reasons else "valid" if middle else "file: a blank line"


def fuzz(number: int, count: int, path: Path) -> Counter[str]:
    """Run `count` rows; the same ones every time."""
    found: Counter[str] = Counter()

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(rows(), st.sampled_from(list(TEMPLATES)), st.booleans())
    def run(case: Case, template: str, allow_special_tokens: bool) -> None:
        found[outcome(case, path / case.name, template, allow_special_tokens)] += 1

    run()
    return found


def split(found: Counter[str]) -> str:
    total = found.total()
    by_place = Counter(
        {place: sum(c for k, c in found.items() if k.startswith(place)) for place in ("file", "row", "template")}
    )
    parts = {"valid": found["valid"]} | {f"refused by the {place}": count for place, count in by_place.items()}
    head = f"{total} rows: " + ", ".join(f"{count} ({count / total:.1%}) {what}" for what, count in parts.items())
    head += f"; {len(found) - 1} kinds of refusal"
    return "\n".join([head, *(f"{count:>8} {kind}" for kind, count in found.most_common() if kind != "valid")])


def test_generated_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fuzz(0, 2000, tmp_path)
    with capsys.disabled():
        print("\n" + split(found).splitlines()[0])
    assert found.total() >= 2000
    assert 0.4 <= found["valid"] / found.total() <= 0.9
    assert len(found) > 30


@pytest.mark.slow
def test_many_generated_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sum((fuzz(number, 2000, tmp_path) for number in range(1, 51)), Counter())
    with capsys.disabled():
        print("\n" + split(found))
    assert found.total() >= 100_000
    assert 0.4 <= found["valid"] / found.total() <= 0.9
