"""Rows of preference methods: every form read, every mistake named, each row the documents that training needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preferences import labelled_rows, pair_rows
from tiny import IM_END, tiny_tokenizer, write_jsonl

import litft
from litft.cli.main import main
from litft.data.loader import Whole
from litft.data.preferences import to_labelled, to_pair
from litft.data.template import ChatEncoder
from litft.errors import DataError

Run = Callable[..., tuple[int, str, str]]
USER = {"role": "user", "content": "Why?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Because.", "No idea."))
HUMAN = {"from": "human", "value": "Why?"}
GPT_GOOD, GPT_BAD = ({"from": "gpt", "value": text} for text in ("Because.", "No idea."))
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def said(conversation: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


ASKED = [("user", "Why?")]
FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "strings": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}, ASKED),
    "messages": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ASKED),
    "single messages": ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, ASKED),
    "string answers": ({"prompt": [USER], "chosen": "Because.", "rejected": "No idea."}, ASKED),
    "messages before": ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, ASKED),
    "whole conversations": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ASKED),
    "UltraFeedback": ({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ASKED),
    "whole conversations, and the prompt": ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ASKED),
    "several turns": (
        {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
        [("user", "Hi"), ("assistant", "Hello."), *ASKED],
    ),
    "several turns, the last as the prompt": (
        {"prompt": "Why?", "chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
        [("user", "Hi"), ("assistant", "Hello."), *ASKED],
    ),
    "ShareGPT": ({"conversations": [HUMAN], "chosen": GPT_GOOD, "rejected": GPT_BAD}, ASKED),
    "instruction": ({"instruction": "Why?", "input": "", "chosen": "Because.", "rejected": "No idea."}, ASKED),
    "instruction and input": (
        {"instruction": "Answer.", "input": "Why?", "chosen": "Because.", "rejected": "No idea."},
        [("user", "Answer.\nWhy?")],
    ),
    "system": (
        {"system": "Be brief.", "prompt": "Why?", "chosen": "Because.", "rejected": "No idea."},
        [("system", "Be brief."), *ASKED],
    ),
    "system message": (
        {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        [("system", "Be brief."), *ASKED],
    ),
    "null keys of a table": (
        {"prompt": "Why?", "messages": None, "chosen": "Because.", "rejected": "No idea.", "margin": None},
        ASKED,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form: str) -> None:
    row, before = FORMS[form]
    pair = to_pair(row)
    assert said(pair.chosen) == [*before, ("assistant", "Because.")]
    assert said(pair.rejected) == [*before, ("assistant", "No idea.")]
    for conversation in (pair.chosen, pair.rejected):
        assert conversation.train is not None
        flags = zip(conversation.messages, conversation.train, strict=True)
        answers = [flag for message, flag in flags if message["role"] == "assistant"]
        assert answers == [False] * (len(answers) - 1) + [None]


def test_answers_of_several_messages_are_trained_from_where_they_part() -> None:
    tail = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    pair = to_pair({"chosen": [*EARLIER, USER, GOOD, *tail], "rejected": [*EARLIER, USER, BAD]})
    assert pair.chosen.train == [None, False, None, None, None, None]
    encoded = ChatEncoder(tiny_tokenizer())(pair.chosen)
    trained = tiny_tokenizer().decode([i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t])
    assert trained == "Because.<|im_end|>Yes.<|im_end|>"


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({}, 0.0),
        ({"margin": 1.5}, 1.5),
        ({"score_chosen": 8, "score_rejected": 2.5}, 5.5),
        ({"chosen_score": 1, "rejected_score": 3}, -2.0),
        ({"margin": 2, "score_chosen": 8, "score_rejected": 1}, 2.0),
        ({"score_chosen": 8}, 0.0),
    ],
    ids=str,
)
def test_margins(more: dict[str, Any], margin: float) -> None:
    assert to_pair({"prompt": "Why?", "chosen": "Because.", "rejected": "No idea.", **more}).margin == margin


LABELLED: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, GOOD]},
    "prompt and completion": {"prompt": "Why?", "completion": "Because."},
    "as messages": {"prompt": [USER], "completion": [GOOD]},
    "ShareGPT": {"conversations": [HUMAN, GPT_GOOD]},
}


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), ("True", True), ("false", False)], ids=str)
@pytest.mark.parametrize("form", LABELLED)
def test_labelled_answers(form: str, label: Any, good: bool) -> None:
    labelled = to_labelled({**LABELLED[form], "label": label})
    assert labelled.label is good
    assert said(labelled.conversation) == [*ASKED, ("assistant", "Because.")]


def test_only_the_last_answer_of_a_labelled_conversation_is_trained() -> None:
    labelled = to_labelled({"messages": [*EARLIER, USER, GOOD], "label": True})
    assert labelled.conversation.train == [None, False, None, True]


PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No idea."}
MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({**PAIR, "rejected": "Because."}, "chosen and rejected are the same", "leave the row out"),
    ({**PAIR, "chosen": " "}, "chosen message 1 (assistant) is empty", "give it text"),
    ({**PAIR, "prompt": None}, "no prompt: chosen and rejected begin with an answer", "add a prompt"),
    ({**PAIR, "chosen": [USER]}, "chosen does not end with an answer", "add the assistant's message"),
    ({**PAIR, "chosen": 7}, "chosen", ""),
    ({**PAIR, "messages": [USER]}, "two prompts: prompt and messages", "keep one of them"),
    ({**PAIR, "margin": "much"}, "margin must be a number", "leave it out"),
    ({**PAIR, "margin": True}, "margin must be a number", "leave it out"),
    ({**PAIR, "score_chosen": "9", "score_rejected": 1}, "score_chosen must be a number", "leave it out"),
    ({**PAIR, "prompt": "Who?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "the prompt is no part of it", ""),
    (
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Who?"}, BAD]},
        "chosen answers another prompt (message 1 differs)",
        "differ from an answer on",
    ),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "chosen is the beginning of the other", ""),
    (
        {"system": "Be long.", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
        "two system prompts",
        "keep one",
    ),
    ({"prompt": "Why?", "chosen": "Because."}, "it lacks rejected", "add rejected"),
    ({"messages": [USER, GOOD]}, "messages row (for full, lora, qlora, distill), not for", "use another method"),
    ({"messages": [USER, GOOD], "label": True}, "kto row (for kto), not for dpo", "use another method"),
    ({"text": "Why?"}, "it lacks chosen, rejected", ""),
]


@pytest.mark.parametrize(("row", "what", "mend"), MISTAKES, ids=[what for _, what, _ in MISTAKES])
def test_mistakes_are_named_with_their_place(row: dict[str, Any], what: str, mend: str) -> None:
    with pytest.raises(DataError) as error:
        to_pair(row, "pairs.jsonl", 3)
    text = str(error.value)
    assert text.startswith("pairs.jsonl:3: ") and what in text and mend in text


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": [USER, GOOD]}, "it lacks label"),
        ({"messages": [USER, GOOD], "label": 1}, "label must be true or false, not 1"),
        (PAIR, "preference row (for dpo, orpo, simpo, cpo, reward), not for kto: it lacks label"),
        ({"messages": [*EARLIER, USER], "label": True}, "the last message is no answer"),
    ],
    ids=str,
)
def test_mistakes_of_labelled_rows(row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as error:
        to_labelled(row, "kto.jsonl", 3)
    assert str(error.value).startswith("kto.jsonl:3: ") and what in str(error.value)


@pytest.mark.parametrize("row", [None, 3, "text", [], [PAIR], {}, {"chosen": None, "rejected": None}], ids=str)
def test_what_is_no_row_is_a_data_error(row: Any) -> None:
    for read in (to_pair, to_labelled):
        with pytest.raises(DataError):
            read(row, "rows.jsonl", 1)


# ---- documents


def test_documents_are_the_templates_and_only_the_answers_are_trained(tiny_llama: Path, tmp_path: Path) -> None:
    """In the file's order, whatever the form; the two of a pair behind the same ids."""
    rows = pair_rows(6)
    whole = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in rows]
    mixed = [row if i % 2 else whole[i] for i, row in enumerate(rows)]
    file = write_jsonl(tmp_path / "rows.jsonl", mixed)
    method = litft.DPO(path=str(tiny_llama), tuner=litft.Full())
    data = litft.PreferenceData(str(file), val_fraction=0).prepare(method)
    tokenizer = tiny_tokenizer()
    for index, row in enumerate(rows):
        documents = data.selection.documents(index)
        for (ids, trained), key in zip(documents, ("chosen", "rejected"), strict=True):
            assert ids.tolist() == tokenizer.apply_chat_template(row["prompt"] + row[key], return_dict=False)
            text = tokenizer.decode(ids[trained])
            assert text == row[key][0]["content"] + "<|im_end|>" and ids[trained][-1] == IM_END
        begin = int(documents[0][1].argmax())
        assert documents[0][0][:begin].tolist() == documents[1][0][:begin].tolist()
    assert data.selection.name(2) == f"{file}:3"


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_keep_pairs_together(packing: bool, tiny_llama: Path, tmp_path: Path) -> None:
    """Chosen answers are even documents, rejected ones odd; margins beside them."""
    rows = [row | {"margin": i / 2} for i, row in enumerate(pair_rows(9))]
    method = litft.DPO(path=str(tiny_llama), tuner=litft.Full())
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = litft.PreferenceData(
        str(file), val_fraction=0, packing=packing, tokens_per_step=500, tokens_per_batch=250
    ).prepare(method)
    seen: list[int] = []
    for step in data.train_dataloader():
        assert all(batch["rows"] * 2 <= len(batch["document_targets"]) for batch in step["micro_batches"])
        seen += step["rows"]
    assert sorted(seen) == list(range(9))
    some = np.array([4, 1, 7])
    batch = data.maker(data.selection)(some, Whole(some, 1))
    assert batch["values"].tolist() == [2.0, 0.5, 3.5]
    counts = data.selection.trained_of[some].reshape(-1)
    assert batch["document_targets"][:6].tolist() == counts.tolist()
    assert float(batch["chosen_denominator"]) == data.selection.trained_of[some, 0].sum()
    assert float(batch["row_denominator"]) == 3


def test_the_same_prompt_is_on_one_side_of_the_split(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{**row, "prompt": f"{i // 3}: why?"} for i, row in enumerate(pair_rows(60))]
    method = litft.DPO(path=str(tiny_llama), tuner=litft.Full())
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = litft.PreferenceData(str(file), val_fraction=0.2).prepare(method)
    both = data.selection, data.val_selections["val"]
    sides = [{(int(some.name(i).rpartition(":")[2]) - 1) // 3 for i in range(len(some))} for some in both]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    prompts = data.held_out_prompts(2)
    assert all([m["role"] for m in prompt.messages] == ["user"] for prompt in prompts) and len(prompts) == 2


def test_bad_rows_are_counted_or_stop_the_run(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [*pair_rows(3), {**PAIR, "rejected": "Because."}])
    method = litft.DPO(path=str(tiny_llama), tuner=litft.Full())
    with pytest.raises(DataError, match=r"rows.jsonl:4: chosen and rejected are the same"):
        litft.PreferenceData(str(file), val_fraction=0).prepare(method)
    data = litft.PreferenceData(str(file), val_fraction=0, bad_rows="skip").prepare(method)
    assert len(data.selection) == 3 and data.selection.dropped == {"bad rows skipped": 1}


def test_what_is_trained_is_not_a_choice() -> None:
    with pytest.raises(litft.UserError, match="the answers are trained"):
        litft.PreferenceData("rows.jsonl", train_on="all")


def test_rows_that_are_broken_json(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(pair_rows(1)[0]) + "\n{broken\n")
    method = litft.DPO(path=str(tiny_llama), tuner=litft.Full())
    with pytest.raises(DataError, match=r"rows.jsonl:2: "):
        litft.PreferenceData(str(file), val_fraction=0).prepare(method)


# ---- the command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command line: exit code, stdout, stderr."""

    def command(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return command


KINDS: dict[str, list[dict[str, Any]]] = {
    "chats": [{"messages": [USER, GOOD]}] * 3,
    "pairs": pair_rows(3),
    "labelled": labelled_rows(3),
}
WRONG = [
    *((method, rows) for method in ("dpo", "orpo", "cpo", "simpo") for rows in ("chats", "labelled")),
    *(("kto", rows) for rows in ("chats", "pairs")),
    *(("lora", rows) for rows in ("pairs", "labelled")),
]
LACKS = {"kto": "label", "lora": "messages"}


@pytest.mark.parametrize(("method", "rows"), WRONG, ids=str)
def test_rows_of_the_wrong_kind(method: str, rows: str, run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    """Exit 2 before the model is loaded, with file, line, and the keys that lack."""
    file = write_jsonl(tmp_path / "rows.jsonl", KINDS[rows])
    out = tmp_path / "run"
    code, _, said = run("finetune", method, "--model", tiny_llama, "--data", file, "--out", out)
    assert code == 2
    assert f"{file}:1: " in said and f"it lacks {LACKS.get(method, 'chosen, rejected')}" in said, said
    assert "Traceback" not in said and len(said.strip().splitlines()) <= 5
    assert not (out / "final").exists()


def test_data_check_and_show(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    rows = pair_rows(3)
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert run("data", "check", file, "--model", tiny_llama)[:2] == (
        0,
        "3 preference rows (for dpo, orpo, simpo, cpo, reward)\n3 rows, 0 bad\n",
    )
    code, said, _ = run("data", "show", file, "--model", tiny_llama, "--json")
    shown = [json.loads(line) for line in said.splitlines()]
    assert code == 0 and len(shown) == 3
    for row, found in zip(rows, shown, strict=True):
        assert {"row", "chosen", "rejected"} <= found.keys()
        for key in ("chosen", "rejected"):
            assert found[key].keys() >= {"tokens", "trained", "text"}
            ids = tiny_tokenizer().apply_chat_template(row["prompt"] + row[key], return_dict=False)
            assert found[key]["tokens"] == ids and found[key]["text"] == tiny_tokenizer().decode(ids)
            assert 0 < sum(found[key]["trained"]) < len(ids) == len(found[key]["trained"])
    bad = write_jsonl(tmp_path / "bad.jsonl", [rows[0], {**PAIR, "chosen": ""}, {**PAIR, "rejected": "Because."}])
    code, said, _ = run("data", "check", bad)
    assert code == 2
    assert f"{bad}:2: chosen message 1 (assistant) is empty" in said
    assert f"{bad}:3: chosen and rejected are the same; leave the row out" in said
    kto = write_jsonl(tmp_path / "kto.jsonl", labelled_rows(2))
    assert run("data", "check", kto)[:2] == (0, "2 kto rows (for kto)\n2 rows, 0 bad\n")
