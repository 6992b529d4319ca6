"""Templates that write a date: of the day they are held to, and otherwise as transformers renders them."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
import trl
from tiny import tiny_tokenizer

from litft.data.conversation import Conversation
from litft.data.dated import on_day, writes_date
from litft.data.template import ChatEncoder

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
QUESTION = Conversation(CHAT[:1], [None], None)
FIRST_LINES = ["", "\n", "  \n", "{{ bos_token }}", "{%- if true -%}\n{%- endif %}\n", "{# c #}\n"]


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "muse_glimmer"])
def test_a_stock_template_tells_of_the_day_it_is_held_to(name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert writes_date(template) and writes_date({"default": template})
    plain = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=on_day(template, date.today())) == plain
    other = tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=on_day(template, date(1999, 12, 31)))
    assert "1999" in other and other != plain
    if name == "gptoss":  # whose control tokens the tiny tokenizer lacks: no mask, so no encoder
        return
    held = ChatEncoder(tokenizer, today=date(1999, 12, 31))
    ids = held.prompt(QUESTION)
    assert "1999" in tokenizer.decode(ids) and "1999" not in tokenizer.decode(ChatEncoder(tokenizer).prompt(QUESTION))


def test_marks_of_what_is_generated_go_along() -> None:
    answer = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    turns = "{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}<|im_end|>{% endif %}"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}\n{% for m in messages %}" + turns + "{% endfor %}"
    encoded = ChatEncoder(tokenizer, today=date(1999, 12, 31))(Conversation(CHAT, [None, None], None))
    assert encoded.text.startswith("1999\n")
    trained = [i for i, on in zip(encoded.ids, encoded.trained, strict=True) if on]
    assert tokenizer.decode(trained) == "yo<|im_end|>"


@pytest.mark.parametrize("begin", FIRST_LINES)
def test_nothing_but_the_date_changes(begin: str) -> None:
    tokenizer = tiny_tokenizer()
    template = begin + "{{ strftime_now('%Y') }}\n{% for m in messages %}{{ m.content }}\n{% endfor %}"
    then = tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=on_day(template, date(1999, 1, 2)))
    now = tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=template)
    assert then == now.replace(str(date.today().year), "1999") and then != now


def test_a_form_that_does_not_stand_in_the_template_is_left_alone() -> None:
    template = "{% set f = '%Y' %}{{ strftime_now(f) }}{{ strftime_now('%d') }}"
    assert not writes_date(template) and on_day(template, date(1999, 1, 2)) == template
    assert not writes_date(None) and not writes_date("{{ messages }}")
