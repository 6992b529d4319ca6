"""Scores of reward models, beside transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_config, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from litft.cli.main import main

PAIRS = [
    {"prompt": "why?", "chosen": "the sun", "rejected": "no moon, no stone, no tree"},
    {"prompt": "how many?", "chosen": "seven", "rejected": "nine"},
]


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    folder = save_tiny(tmp_path / "reward", "llama")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)).save_pretrained(folder)
    return folder


def test_pairs_have_transformers_scores_and_nothing_is_overwritten(
    reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_jsonl(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "scores.jsonl"
    words = ["score", str(reward), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(reward), AutoTokenizer.from_pretrained(reward)
    for pair, row in zip(PAIRS, found, strict=True):
        for answer in ("chosen", "rejected"):
            turns = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[answer]}]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.no_grad():
                assert row[f"{answer}_score"] == pytest.approx(float(model(ids).logits), abs=1e-5)
        assert {key: row[key] for key in pair} == pair
    right = sum(row["chosen_score"] > row["rejected_score"] for row in found) / len(found)
    assert f"2 rows in {out}; the chosen answer scores higher in {right:.1%}" in capsys.readouterr().err
    before = out.read_bytes()
    assert main(words) == 2
    assert "is there, and not overwritten" in capsys.readouterr().err and out.read_bytes() == before
