"""The mask over the 41 stock templates of the trl wheel, case by case.

Three judges nobody here wrote a template for: expectations by hand from reading each template, transformers' own
generation prompt for the same messages, and the marks in TRL's training variants of the templates.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from templates_helpers import FAMILIES, SHAPES, SPECIAL, stock, stock_folder, stock_names, tokenizer

from litft.data.conversation import Conversation
from litft.data.template import ChatEncoder, Encoded
from litft.errors import DataError


def encoder(template: str) -> ChatEncoder:
    tok = tokenizer()
    tok.chat_template = template
    return ChatEncoder(tok)


def stretches(encoded: Encoded) -> list[str]:
    """The trained tokens as text, a string for each unbroken stretch."""
    found: list[list[int]] = []
    before = False
    for token, trained in zip(encoded.ids, encoded.trained, strict=True):
        if trained and not before:
            found.append([])
        if trained:
            found[-1].append(token)
        before = trained
    return [tokenizer().decode(ids) for ids in found]


def in_form(encode: ChatEncoder, conversation: Conversation) -> list[dict]:
    """The messages as the template takes them: the oracle must be asked in the same form."""
    return encode._learn(conversation.tools).form(conversation.messages)


def test_every_stock_template_has_expectations() -> None:
    assert sorted(FAMILIES) == stock_names() and len(FAMILIES) == 41


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], tuple[str, str]]:
    """(template, shape): (right, refused by the template, refused, wrong) and what was seen."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, family in FAMILIES.items():
        encode = encoder(stock(name))
        for shape, conversation in SHAPES.items():
            try:
                encoded = encode(conversation)
            except DataError as error:
                reason = str(error)
                cannot = family.cannot.get(shape)
                if cannot is None or cannot not in reason or "chats.jsonl:7" not in reason:
                    seen[name, shape] = "wrong", f"refused: {reason}"
                else:
                    by_template = "the chat template refuses" in reason or "does not render" in reason
                    seen[name, shape] = ("template refuses" if by_template else "refused"), reason
                continue
            want, got = family.expected(shape), stretches(encoded)
            # Answers of which nothing stands between them come as one stretch.
            right = shape not in family.cannot and "".join(want) == "".join(got) and len(got) <= len(want)
            seen[name, shape] = ("right" if right else "wrong"), f"want {want}\n    got {got}"
    return seen


def test_stock_templates_table(outcomes: dict, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {shape: Counter(what for (_, s), (what, _) in outcomes.items() if s == shape) for shape in SHAPES}
    total = sum(counts.values(), Counter())
    columns = ("right", "template refuses", "refused", "wrong")
    with capsys.disabled():
        print(f"\n{'41 stock templates':<18}" + "".join(f"{c:>18}" for c in columns))
        for shape, count in {**counts, "all": total}.items():
            print(f"{shape:<18}" + "".join(f"{count[c]:>18}" for c in columns))
    wrong = [f"{key}: {note}" for key, (what, note) in outcomes.items() if what == "wrong"]
    assert not wrong, "\n".join(wrong)
    assert total["right"] / (total["right"] + total["refused"]) >= 0.95


@pytest.mark.parametrize("name", stock_names())
def test_ids_are_those_of_the_whole_render(name: str) -> None:
    encode = encoder(stock(name))
    for conversation in SHAPES.values():
        try:
            encoded = encode(conversation)
        except DataError:
            continue
        oracle = tokenizer().apply_chat_template(in_form(encode, conversation), tools=conversation.tools)
        assert encoded.ids == oracle["input_ids"]


# Where the template writes an answer otherwise than its own generation prompt begins it, nothing can be compared:
# reasoning that the prompt opens but history (or an answer without any) has not, and Gemma's header after a result.
PROMPT_DIFFERS = re.compile(r"<think>\n$|</tool_response>|<tool_response\|>$|<think>\n\n</think>\n\n$|<think></think>$")


@pytest.mark.parametrize("name", stock_names())
def test_b13_trained_part_starts_where_the_inference_prompt_ends(name: str) -> None:
    encode = encoder(stock(name))
    compared = 0
    for conversation in SHAPES.values():
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant" or i == 0:
                continue
            alone = Conversation(conversation.messages, [k == i for k in range(len(conversation.messages))])
            alone.tools = conversation.tools
            try:
                encoded = encode(alone)
            except DataError:
                continue
            before = Conversation(conversation.messages[:i], [None] * i, conversation.tools)
            prompt = tokenizer().apply_chat_template(
                in_form(encode, before), tools=before.tools, add_generation_prompt=True
            )["input_ids"]
            assert encode.prompt(before) == prompt
            begin = encoded.trained.index(True)
            no_header = name == "diffusion_gemma" and before.messages[-1]["role"] == "tool"
            if encoded.ids[: len(prompt)] == prompt and not no_header:
                assert begin == len(prompt), tokenizer().decode(encoded.ids[:begin])
                compared += 1
            else:
                assert PROMPT_DIFFERS.search(tokenizer().decode(prompt)) or conversation is SHAPES["in a row"]
    assert compared >= 1 or name.startswith("deepseek")  # whose prompt opens a reasoning that no answer shows


def twins() -> list[str]:
    return [n for n in stock_names() if (stock_folder() / f"{n}_training.jinja").exists()]


# What TRL's variants train beyond the answer: the header (deepseek), the end-of-text that only the last turn has
# (phi), the `<think></think>` that the prompt supplies (nemotron, qwen3.5); and what they leave out: the mark of the
# tool result on which Gemma stops.
TRL_ALSO = {
    "deepseek_r1_distill": "<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    "deepseekv3": "<｜Assistant｜>|<｜tool▁outputs▁end｜>",
    "phi3": "<eos>",
    "phi3_5": "<eos>",
    "gptoss": re.escape("<|start|>assistant"),
    "muse_glimmer": re.escape("<|start|>assistant"),
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
    "qwen3_5_think": "<think>\n",
    "qwen3_6": "<think>\n",
    "qwen3_8": "<think>\n",
    **dict.fromkeys([n for n in stock_names() if n.startswith("nemotron")], "<think>\n|<think></think>"),
}


@pytest.mark.parametrize("name", twins())
def test_masks_agree_with_trl_training_templates(name: str) -> None:
    """Native marks of the variant, where it renders the same text: equal but for the differences named above."""
    tok = tokenizer()
    compared = 0
    for conversation in SHAPES.values():
        encode = encoder(stock(name))
        try:
            encoded = encode(conversation)
        except DataError:
            continue
        tok.chat_template = (stock_folder() / f"{name}_training.jinja").read_text()
        oracle = tok.apply_chat_template(
            in_form(encode, conversation), tools=conversation.tools, return_dict=True, return_assistant_tokens_mask=True
        )
        if oracle["input_ids"] != encoded.ids:
            continue
        compared += 1
        ours_only = [
            i for i, a, b in zip(encoded.ids, encoded.trained, oracle["assistant_masks"], strict=True) if a > b
        ]
        theirs = [i for i, a, b in zip(encoded.ids, encoded.trained, oracle["assistant_masks"], strict=True) if b > a]
        assert tok.decode(ours_only) in ("", "<|tool_response>")
        assert re.fullmatch(rf"(\s|{TRL_ALSO.get(name, '(?!)')})*", tok.decode(theirs)), tok.decode(theirs)
    assert compared >= 2 or name == "glm4moe"


@pytest.mark.parametrize("name", twins())
def test_native_marks_give_the_same_mask_as_none(name: str) -> None:
    """A template with {% generation %} and the same one without: the marks neither add nor lose anything."""
    marked = (stock_folder() / f"{name}_training.jinja").read_text()
    plain = re.sub(r"(\{%-?\s*)end(generation)", r"\1endif", marked)
    plain = re.sub(r"(\{%-?\s*)generation", r"\1if true", plain)
    assert "endif" in plain and not re.search(r"\{%-?\s*generation", plain)
    for shape in ("two", "reasoning", "in a row", "tools"):
        conversation = SHAPES[shape]
        results = []
        for template in (marked, plain):
            try:
                encoded = encoder(template)(conversation)
                results.append((encoded.text, stretches(encoded)))
            except DataError as error:
                results.append(("refused", str(error)))
        assert results[0] == results[1], shape


def test_every_stock_end_of_turn_is_a_stop() -> None:
    tok = tokenizer()
    for name, family in FAMILIES.items():
        stops = {tok.convert_ids_to_tokens(i) for i in encoder(stock(name)).stop_ids}
        ends = [family.last or family.end, *([family.called] if family.called else [])]
        assert stops == {next(s for s in SPECIAL if e.endswith(s)) for e in ends}, name
