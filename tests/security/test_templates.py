"""Chat templates come with somebody's model: they render in a sandbox, within bounds of time, memory and text."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tiny import CHATML, chat_rows, tiny_tokenizer, write_jsonl

from litft.data import bounds
from litft.data.conversation import Conversation
from litft.data.rows import to_conversation
from litft.data.template import ChatEncoder, find_template
from litft.errors import DataError, UserError

ESCAPES = {
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch FILE').read() }}",
    "attr": "{{ joiner|attr('__init__')|attr('__globals__')|attr('get')('os')|attr('system')('touch FILE') }}",
    "namespace": "{{ namespace['__init__']['__globals__']['os'].system('touch FILE') }}",
    "subclasses": (
        "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}"
        "{{ c(['touch', 'FILE']).wait() }}{% endif %}{% endfor %}"
    ),
    "builtins": "{{ self.__init__.__globals__.__builtins__['open']('FILE', 'w').close() }}",
    "map": "{{ ([lipsum]|map(attribute='__globals__')|first)['os'].system('touch FILE') }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__.__builtins__.open('FILE', 'w').close() }}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_builtins['open']('FILE', 'w').close() }}",
    "a message": "{{ messages.__class__.__base__.__subclasses__() }}{{ lipsum.__globals__.os.system('touch FILE') }}",
    "concatenated": "{{ lipsum['__glo' ~ 'bals__']['os']['sys' ~ 'tem']('touch FILE') }}",
}
"""Ways out of a template that isn't sandboxed, each of which touches FILE."""


def encode(template: str, row: dict[str, Any] | None = None) -> str:
    encoder = ChatEncoder(tiny_tokenizer(template))
    return encoder(to_conversation(row or chat_rows(1)[0], "f", 1)).text


@pytest.mark.parametrize("way", ESCAPES)
def test_ways_out_of_the_sandbox(way: str, canary: Any) -> None:
    hostile = ESCAPES[way].replace("FILE", str(canary.file)) + CHATML
    with pytest.raises(UserError, match="chat template"):
        encode(hostile)
    with pytest.raises(UserError, match="chat template"):
        ChatEncoder(tiny_tokenizer(hostile)).prompt(Conversation([{"role": "user", "content": "x"}], [None]))
    with pytest.raises(UserError):
        find_template(tiny_tokenizer(hostile))
    values = {"messages": chat_rows(1)[0]["messages"]}
    canary.would(lambda: jinja2.Environment().from_string(hostile).render(values))


@pytest.mark.parametrize(
    "leak",
    [
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{m.__class__.__mro__}'.format(m=messages) }}",
        "{{ '{m[0].__class__}'.format_map({'m': messages}) }}",
        "{{ ('{0.__class__}'|string).format(messages) }}",
    ],
)
def test_format_strings_reach_no_attributes(leak: str) -> None:
    """The values would stand in the ids that are trained."""
    values = {"messages": [["x"]]}
    assert "class" in jinja2.Environment().from_string(leak).render(values)
    try:
        assert "<class" not in encode(CHATML + leak)
    except UserError as error:
        assert "chat template" in str(error) and "<class" not in str(error)


@pytest.mark.parametrize("word", ["{% include 'FILE' %}", "{% import 'FILE' as x %}", "{% extends 'FILE' %}"])
def test_no_other_file_is_read(word: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("SECRET")
    hostile = word.replace("FILE", str(tmp_path / "secret"))
    plain = jinja2.Environment(loader=jinja2.FileSystemLoader("/"))
    assert "SECRET" in plain.from_string(word.replace("FILE", str(tmp_path / "secret")[1:]) + "{{ x }}").render() or (
        "import" in word
    )
    with pytest.raises(UserError) as error:
        encode(CHATML + hostile)
    assert "SECRET" not in str(error.value)


def test_a_template_cannot_change_the_messages() -> None:
    row = chat_rows(1)[0]
    with pytest.raises(UserError, match="chat template"):
        encode("{{ messages.append(messages[0]) }}" + CHATML, row)
    assert row == chat_rows(1)[0]


# ---- where a template may come from, and what renders it


def inline(model: Path, hostile: str) -> list[str]:
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": hostile}))
    return []


def in_a_file(model: Path, hostile: str) -> list[str]:
    (model / "chat_template.jinja").write_text(hostile)
    return []


def for_tools(model: Path, hostile: str) -> list[str]:
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(hostile)
    return []


def for_tools_inline(model: Path, hostile: str) -> list[str]:
    both = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": hostile}]
    return inline(model, both)  # type: ignore[arg-type]


def given(model: Path, hostile: str) -> list[str]:
    file = model.parent / "hostile.jinja"
    file.write_text(hostile)
    return ["--data.chat_template", str(file)]


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that the template for tools writes."""
    schema = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    rows = [row | {"tools": [{"type": "function", "function": schema}]} for row in chat_rows(3)]
    return write_jsonl(tmp_path_factory.mktemp("tools") / "tools.jsonl", rows)


@pytest.mark.parametrize("verb", ["finetune", "generate", "chat", "data"])
@pytest.mark.parametrize("place", [inline, in_a_file, for_tools, for_tools_inline, given])
def test_a_hostile_template(verb: str, place: Any, model: Path, with_tools: Path, canary: Any, litft: Any) -> None:
    hostile = ESCAPES["lipsum"].replace("FILE", str(canary.file)) + CHATML
    words = place(model, hostile)
    if words and verb in ("generate", "chat"):
        words = []  # they have no such flag: a hostile template comes to them with the model
        in_a_file(model, hostile)
    data = ["--data", with_tools] if place in (for_tools, for_tools_inline) and verb != "chat" else []
    if verb == "data":
        code, said = litft("data", "show", *(data[1:] or [with_tools]), "--model", model, *words)
    elif verb == "generate" and data:
        code, said = litft(verb, model, *data, "--out", "answers.jsonl")
    else:
        code, said = litft(verb, model, *data, *words)
    refused = code == 2 or (verb == "chat" and "chat template refuses" in said)
    assert refused or (verb == "chat" and place in (for_tools, for_tools_inline)), said  # which never has tools
    assert "Traceback" not in said and ("__globals__" in said or not refused), said
    canary.would(lambda: jinja2.Environment().from_string(hostile).render(messages=[]))


# ---- bombs


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "PATIENCE", 0.4)
    monkeypatch.setattr(bounds, "PATIENCE_LEARNING", 0.4)
    monkeypatch.setattr(bounds, "ROOM", 256 << 20)


BOMBS = {
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "more than 0.4 s",
    ),
    "a long loop": ("{% for a in range(10**9) %}x{% endfor %}", "Range too big"),
    "a large power": ("{{ 10 ** (10 ** 8) }}", "more than 0.4 s"),
    "a long text": ("{{ 'a' * 10 ** 10 }}", "GB for one conversation"),
    "padding": ("{{ '%09999999999d' % 1 }}", "GB for one conversation"),
    "center": ("{{ 'a'|center(10 ** 10) }}", "GB for one conversation"),
    "join": ("{{ range(99999)|list|join('a' * 99999) }}", "GB for one conversation"),
    "doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "GB for one conversation",
    ),
    "growth": ("{{ messages[0].content * 10 ** 6 }}", "characters for a conversation of"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str, short_patience: None) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    text, says = BOMBS[bomb]
    peak, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match=says):
        encode(text + CHATML)
    assert time.process_time() - begin < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < (512 << 10)  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_a_bomb_that_waits_for_its_row(short_patience: None) -> None:
    """It costs that row, as any other bad row; the next one is none the worse."""
    bomb = "{% if messages[0].content == 'now' %}" + BOMBS["nested loops"][0] + "{% endif %}" + CHATML
    encoder = ChatEncoder(tiny_tokenizer(bomb))
    row = {"messages": [{"role": "user", "content": "now"}, {"role": "assistant", "content": "x"}]}
    good = to_conversation(chat_rows(1)[0], "f", 1)
    before = encoder(good)
    with pytest.raises(DataError, match=r"f:7: the chat template takes more than 0.4 s for one conversation"):
        encoder(to_conversation(row, "f", 7))
    assert encoder(good) == before


@pytest.mark.parametrize("verb", ["finetune", "generate", "chat"])
def test_a_bomb_in_a_model(verb: str, model: Path, litft: Any, short_patience: None) -> None:
    in_a_file(model, BOMBS["a long text"][0] + CHATML)
    code, said = litft(verb, model)
    assert code == 2 and "the chat template takes more than" in said and "another with data.chat_template" in said, said


def test_bounds_hold_in_worker_processes(short_patience: None) -> None:
    """Where large files are encoded: a child of fork, whose timers are its own."""
    child = os.fork()
    if child == 0:
        try:
            encode(BOMBS["nested loops"][0] + CHATML)
        except UserError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
