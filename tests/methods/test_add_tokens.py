"""Tokens that the chat template needs and the tokenizer lacks: new rows, trained and exported."""

from __future__ import annotations

import json

import pytest
import torch
from lightning import Trainer

from litft import SFT, ChatData, Full, LoRA, UserError
from tests.tiny import chat_rows, save_tiny, tiny_tokenizer

TURN = "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|over|>\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"


def prepared(tmp_path, **method):
    folder = save_tiny(tmp_path / "model", "qwen2")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24, 0)))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    data = ChatData(str(tmp_path / "rows.jsonl"), chat_template=str(tmp_path / "template.jinja"), val_fraction=0)
    return SFT(str(tmp_path / "model" if folder is None else folder), **method), data


def trainer(steps):
    return Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )


def test_without_the_switch_missing_tokens_are_an_error(tmp_path):
    method, data = prepared(tmp_path, tuner=LoRA(r=4))
    with pytest.raises(UserError, match=r"<\|over\|>.*model\.add_tokens"):
        data.prepare(method)


@pytest.mark.parametrize("tuner", [LoRA, Full])
def test_d8_added_tokens_are_trained_and_exported(tmp_path, tuner):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    method, data = prepared(tmp_path, tuner=tuner(), lr=1e-2, add_tokens=True)
    before = len(tiny_tokenizer())
    trainer(4).fit(method, datamodule=data)
    ids = [method.tokenizer.convert_tokens_to_ids(token) for token in ("<|turn|>", "<|over|>")]
    assert sorted(ids) == [before, before + 1]
    live = method.net.model.eval()
    text = method.tokenizer.apply_chat_template([{"role": "user", "content": "red sun"}], return_tensors="pt")
    inputs = text["input_ids"] if hasattr(text, "keys") else text
    assert set(ids) <= set(inputs[0].tolist())
    with torch.inference_mode():
        live.set_attn_implementation("eager")
        expected = live(inputs, use_cache=False).logits
    folder = method.save(tmp_path / "out")
    load = AutoPeftModelForCausalLM if tuner is LoRA else AutoModelForCausalLM
    options = {} if tuner is Full else {"dtype": torch.float32}
    again = load.from_pretrained(folder, attn_implementation="eager", **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<|turn|>", "<|over|>"]) == ids
    with torch.inference_mode():
        torch.testing.assert_close(again(inputs).logits, expected, atol=1e-5, rtol=1e-4)
    settings = json.loads((folder / "generation_config.json").read_text())
    assert ids[1] in settings["eos_token_id"]


def test_d8_rows_of_added_tokens_move(tmp_path):
    method, data = prepared(tmp_path, tuner=LoRA(r=4), lr=1e-2, add_tokens=True)
    data.prepare(method, max_steps=4)
    fresh = SFT(method.path, tuner=LoRA(r=4), add_tokens=True)
    fresh.new_tokens, fresh.__dict__["tokenizer"] = method.new_tokens, method.tokenizer
    start = fresh.build().net.model.get_input_embeddings()
    trainer(4).fit(method, datamodule=data)
    end = method.net.model.get_input_embeddings()
    ids = torch.arange(len(method.tokenizer))[None]
    with torch.no_grad():
        moved = (end(ids) - start(ids))[0].abs().amax(1)
    assert (moved[-2:] > 0).all() and (moved[:-2] == 0).all()


def test_an_adapter_with_added_tokens_is_gone_on_with(tmp_path):
    method, data = prepared(tmp_path, tuner=LoRA(r=4), lr=1e-2, add_tokens=True)
    trainer(3).fit(method, datamodule=data)
    folder = method.save(tmp_path / "out")
    for tuner in (LoRA(r=4), Full()):
        again = SFT(str(folder), tuner=tuner)
        more = ChatData(str(tmp_path / "rows.jsonl"), val_fraction=0)
        more.prepare(again, max_steps=2)
        again.build()
        with torch.no_grad():
            batch = more.train_dataloader(0, 0).dataset[0]["micro_batches"][0]
            torch.testing.assert_close(again.eval().loss(batch), method.eval().loss(batch), rtol=1e-5, atol=1e-6)
