"""Losses of rows against plain transformers, a row at a time, and against what a run has said of itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IM_END, chat_rows, save_tiny, tiny_tokenizer, write_jsonl
from training import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from litft.data.conversation import Conversation
from litft.data.rows import to_conversation
from litft.errors import DataError
from litft.evaluate.losses import encode, row_losses, text_sizes
from litft.evaluate.run import evaluate
from litft.infer.load import load_for_inference
from litft.tuners import Full, LoRA


def plain_nll(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[float, int]:
    """Summed cross-entropy and count of what the assistant says, each answer with the token that ends it."""
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    total, count = 0.0, 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, return_dict=True)["input_ids"]
        for at in range(len(asked), len(ids)):
            total, count = total - float(log_p[at - 1, ids[at]]), count + 1
            if ids[at] == IM_END:
                break
    return total, count


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "qwen3_moe", "gpt2"])
def test_each_row_has_the_loss_that_transformers_computes_for_it_alone(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "model", family)
    rows = chat_rows(24, seed=5)
    bundle = load_for_inference(folder, device="cpu")
    before = bundle.model.config._attn_implementation
    documents = encode([to_conversation(row) for row in rows], bundle.tokenizer, max_length=512)
    found = row_losses(bundle, documents)
    assert (bundle.model.config._attn_implementation, bundle.model.config.use_cache) == (before, True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    wanted = [plain_nll(model.eval(), tokenizer, row["messages"]) for row in rows]
    assert documents.trained.tolist() == [count for _, count in wanted]
    np.testing.assert_allclose(found, [total for total, _ in wanted], rtol=1e-5)


@pytest.mark.parametrize("tuner", [Full(), LoRA(r=4)], ids=["full", "lora"])
def test_the_loss_is_the_runs_own_val_loss(tmp_path: Path, tuner: Any) -> None:
    base = save_tiny(tmp_path / "base")
    rows = write_jsonl(tmp_path / "train.jsonl", chat_rows(24))
    held = [write_jsonl(tmp_path / f"{name}.jsonl", chat_rows(12, seed=seed)) for name, seed in (("a", 7), ("b", 8))]
    limits = {"max_steps": 3, "val_check_interval": 3}
    trace = train(base, rows, tuner=tuner, trainer=limits, val={"a": str(held[0]), "b": str(held[1])})
    trace.method.save(tmp_path / "final")
    found = evaluate(str(tmp_path / "final"), {"a": str(held[0]), "b": str(held[1])}, answers=0, device="cpu")
    for name in ("a", "b"):
        assert found.facts["sets"][name]["loss"] == pytest.approx(trace.val_losses[-1][f"val_loss/{name}"], abs=1e-5)
        assert found.facts["sets"][name]["perplexity"] == pytest.approx(math.exp(found.facts["sets"][name]["loss"]))


def test_rows_that_training_leaves_out_have_no_loss(tiny_llama: Path) -> None:
    rows = [to_conversation(row) for row in chat_rows(20)]
    bundle = load_for_inference(tiny_llama, device="cpu")
    whole = encode(rows, bundle.tokenizer, max_length=512)
    cut = encode(rows, bundle.tokenizer, max_length=40)
    assert cut.used.tolist() == (whole.lengths <= 40).tolist() and 0 < cut.used.sum() < 20
    assert cut.left_out == {"longer than 40 tokens": int((~cut.used).sum())}
    np.testing.assert_allclose(
        row_losses(bundle, cut), np.where(cut.used, row_losses(bundle, whole), 0.0), rtol=1e-5, atol=1e-6
    )


def test_plain_text_counts_whole_and_bytes_are_those_of_the_trained_text(tiny_llama: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [Conversation(text="the moon är blå"), to_conversation(chat_rows(1)[0])]
    documents = encode(rows, tokenizer, max_length=512)
    said = sum(len(m["content"]) for m in rows[1].messages if m["role"] == "assistant")
    assert text_sizes(documents, tokenizer).tolist() == [len(" moon är blå".encode()), said]  # nothing predicts "the"
    assert documents.trained[0] == len(documents.rows[0][0]) - 1


def test_a_row_that_the_template_refuses_is_an_error_or_counted() -> None:
    tokenizer = tiny_tokenizer(
        "{% if messages|length > 2 %}{{ raise_exception('two turns only') }}{% endif %}"
        + tiny_tokenizer().chat_template
    )
    rows = [to_conversation(row) for row in chat_rows(20)]
    with pytest.raises(DataError, match="two turns only"):
        encode(rows, tokenizer, max_length=512)
    skipped = encode(rows, tokenizer, max_length=512, skip_bad=True)
    assert skipped.left_out == {"refused by the chat template": sum(len(row.messages) > 2 for row in rows)}
