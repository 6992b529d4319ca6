"""`litft quantize`: folders that plain transformers loads, and losses that are those of plain transformers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import logits, run_of
from tiny import IM_END, chat_rows, save_tiny, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from litft.cli.main import main
from litft.data.rows import to_conversation
from litft.data.template import ChatEncoder
from litft.export.quantize import FORMS
from litft.infer.load import load_for_inference

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
BYTES = {"int8": 1.1, "int4": 1.3, "nf4": 0.63}
"""Of a quantised weight at most, scales and what describes them included."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(24, seed=4))


@torch.no_grad()
def plain_loss(folder: Path, rows: Path) -> float:
    """The mean loss of trained tokens, row by row, by transformers."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    encoder, total, count = ChatEncoder(tokenizer), 0.0, 0
    for line in rows.read_text().splitlines():
        encoded = encoder(to_conversation(json.loads(line), "rows", 1))
        ids, mask = torch.tensor([encoded.ids]), torch.tensor(encoded.trained)
        nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none")
        total, count = total + nll[mask[1:]].sum().item(), count + int(mask[1:].sum())
    return total / count


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_loads_in_plain_transformers_and_its_loss_is_the_one_printed(
    tmp_path: Path, rows: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16, **SHAPE)
    out = tmp_path / form
    assert main(["quantize", str(base), "--to", form, "--out", str(out), "--data", str(rows)]) == 0
    said = capsys.readouterr().out
    before, after = map(float, re.search(r"tokens: ([\d.]+) -> ([\d.]+)", said).groups())  # type: ignore[union-attr]
    assert abs(before - plain_loss(base, rows)) < 2e-2 and abs(after - plain_loss(out, rows)) < 2e-2
    assert before != after and abs(before - after) < 0.3

    again, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole = AutoModelForCausalLM.from_pretrained(base)
    linears = sum(p.numel() for n, p in whole.named_parameters() if "proj" in n)
    saved = (base / "model.safetensors").stat().st_size - (out / "model.safetensors").stat().st_size
    assert saved > linears * (2 - BYTES[form]) and f"14 layers in {form}" in said
    assert (logits(again) - logits(whole)).abs().mean() < 0.5 * logits(whole).std()
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(again.get_parameter(name), whole.get_parameter(name)), name
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template
    assert GenerationConfig.from_pretrained(out).eos_token_id == [IM_END]


def test_a_run_is_merged_and_measured_on_what_it_held_out(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = save_tiny(tmp_path / "base", **SHAPE), tmp_path / "run"
    train = ["finetune", "lora", "--data", str(rows), "--model", str(base), "--out", str(run), "--samples.count", "0"]
    assert main([*train, "--trainer.max_steps", "8", "--model.lr", "0.02", "--trainer.precision", "32-true"]) == 0
    lines = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    column = lines[0].index("val_loss")
    best = min(float(line[column]) for line in lines[1:] if line[column])
    capsys.readouterr()
    out = tmp_path / "int8"
    assert main(["quantize", str(run), "--to", "int8", "--out", str(out)]) == 0
    before, after = map(float, re.search(r"tokens: ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups())  # type: ignore[union-attr]
    assert abs(before - best) < 2e-4  # as printed
    assert abs(after - before) < 0.05
    card = (out / "README.md").read_text()
    assert "## Quantised to int8" in card and f"{before:.4f} before, {after:.4f} after." in card
    assert card.index("Quantised") < card.index("## How to load")
    assert not (out / "adapter_config.json").exists()
    short = ["quantize", str(run / "final"), "--to", "int8", "--limit", "1", "--out", str(tmp_path / "short")]
    assert main(short) == 0
    one = re.search(r"loss on (\d+) held-out", capsys.readouterr().out)
    assert one is not None and 0 < int(one[1]) < 100
    shutil.rmtree(tmp_path / "short")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "int8", "run"]


def test_quantised_folders_answer_and_are_not_trained_or_adapted(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16, **SHAPE)
    for form in ("int8", "nf4"):
        out = tmp_path / form
        assert main(["quantize", str(base), "--to", form, "--out", str(out), "--data", str(rows)]) == 0
        bundle = load_for_inference(out, device="cpu")
        assert torch.equal(logits(bundle.model), logits(AutoModelForCausalLM.from_pretrained(out)))
        assert main(["generate", str(out), "--prompt", "why?", "--max_new_tokens", "3"]) == 0
        capsys.readouterr()
        for words in (
            ["finetune", "lora", "--model", str(out), "--data", str(rows)],
            ["export", str(out), "--to", "hf", "--out", str(tmp_path / "x")],
            ["quantize", str(out), "--to", "int8", "--out", str(tmp_path / "x"), "--data", str(rows)],
        ):
            assert main(words) == 2
            assert "is stored quantised" in capsys.readouterr().err
    run = run_of(tmp_path / "adapter", shape=SHAPE)
    config = run / "final" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "adapter" / "base"), str(tmp_path / "int8")))
    assert main(["generate", str(run), "--prompt", "why?"]) == 2
    assert "is stored quantised" in capsys.readouterr().err


def test_mistakes_are_named_before_long_work(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, odd = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "odd", hidden_size=48)
    gpt2 = save_tiny(tmp_path / "gpt2", "gpt2")
    out = ["--out", str(tmp_path / "out")]
    cases: list[tuple[list[Any], str]] = [
        ([base, "--to", "int8", *out], "no held-out rows to measure on\nmend: --data FILE"),
        ([odd, "--to", "int4", *out, "--data", rows], "which 32 does not divide\nmend: --to int8\n"),
        ([base, "--to", "nf4", *out, "--data", rows], "which 64 does not divide\nmend: --to int8\n"),
        ([gpt2, "--to", "int8", *out, "--data", rows], "no linear layers that --to int8 quantises"),
        ([base, "--to", "int3", *out], "--to"),
        ([base, "--to", "int8", "--out", base, "--data", rows], "which is only read"),
    ]
    for words, said in cases:
        assert main(["quantize", *map(str, words)]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    assert main(["quantize", str(base), "--to", "int4", *out, "--data", str(rows)]) == 2
    assert "pip install 'litft[torchao]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
