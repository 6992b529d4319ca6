"""`litft export --to hf` and `--to vllm`: folders for other programs, and adapters that stay adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import distance, logits, run_of, with_peft
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CHATML, FAMILIES, IM_END, save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from litft.cli.export import TARGETS
from litft.cli.main import main
from litft.export.hf import DTYPES, write_model
from litft.export.vllm import RANKS, beyond_vllm, served_rank
from litft.models.resolve import resolve


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_as_it_was_stored(tmp_path: Path, family: str) -> None:
    base = save_tiny(tmp_path / "base", family)
    written = write_model(resolve(base), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert written.check.difference < 1e-4 and written.check.tokens > 100
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} <= {"eos_token_id", "use_cache"}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = save_tiny(tmp_path / "base", "qwen3"), tmp_path / "out"
    assert main(["export", str(base), "--to", "hf", "--dtype", name, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 0 MB in {name}" in said and "checked: " in said
    assert ("rounding the weights" in said) is (name != "fp32")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == getattr(torch, DTYPES[name]) and model.config.use_cache is True
    assert AutoTokenizer.from_pretrained(out).chat_template == CHATML
    assert GenerationConfig.from_pretrained(out).eos_token_id == [IM_END]


def test_an_adapter_is_merged_or_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, "llama", modules_to_save=["lm_head"])
    merged, kept, half = (tmp_path / name for name in ("merged", "kept", "half"))
    assert main(["export", str(run), "--to", "hf", "--dtype", "fp32", "--out", str(merged)]) == 0
    assert main(["export", str(run), "--to", "hf", "--adapter", "keep", "--out", str(kept)]) == 0
    options = ["--adapter", "keep", "--dtype", "bf16"]
    assert main(["export", str(run / "final"), "--to", "hf", *options, "--out", str(half)]) == 0
    assert f"its base: {tmp_path / 'base'}" in capsys.readouterr().out
    expected = with_peft(run)
    assert distance(logits(AutoModelForCausalLM.from_pretrained(merged)), expected) < 1e-4
    assert distance(logits(AutoPeftModelForCausalLM.from_pretrained(kept, dtype=torch.float32)), expected) < 1e-5
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run / "final", half))
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert AutoTokenizer.from_pretrained(kept).chat_template == CHATML
    assert not (kept / "config.json").exists()


def test_vllm_takes_an_adapter_with_flags_that_hold_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_of(tmp_path, "qwen3", r=12, rslora=True), tmp_path / "my adapter"
    assert main(["export", str(run), "--to", "vllm", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    flags = f"--enable-lora --lora-modules 'my adapter={out}' --max-lora-rank 16"
    assert f"vllm serve {tmp_path / 'base'} {flags}" in said and "was not measured" in said
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        name = re.compile(r"base_model\.model\.model\.layers\.\d+\.\w+\.\w+_proj\.lora_[AB]\.weight")
        assert all(name.fullmatch(key) for key in file.keys())  # noqa: SIM118 - not a mapping
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in out.iterdir()}
    assert [served_rank(rank) for rank in (1, 4, 16, 33, 300)] == [1, 8, 16, 64, 320]
    assert list(RANKS) == sorted(RANKS)


UNSERVED: dict[str, dict[str, Any]] = {
    "DoRA": {"dora": True},
    "whole trained modules": {"modules_to_save": ["lm_head"]},
    "trained embedding rows": {"tokens": ["<|new|>"]},
    "ranks that differ": {"rank_pattern": {"q_proj": 2}},
    "alphas that differ": {"alpha_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("what", UNSERVED)
def test_vllm_gets_a_merged_model_where_it_can_not_run_the_adapter(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_of(tmp_path, "llama", **UNSERVED[what]), tmp_path / "out"
    assert any(reason.startswith(what) for reason in beyond_vllm(run / "final"))
    assert main(["export", str(run), "--to", "vllm", "--adapter", "keep", "--out", str(out)]) == 2
    assert what in capsys.readouterr().err and not out.exists()
    assert main(["export", str(run), "--to", "vllm", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"vllm serve {out}" in said and what in said and "--enable-lora" not in said
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        file.name for file in out.iterdir()
    }


def test_vllm_does_not_get_what_it_would_scale_or_start_wrongly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters of PEFT's that differ from plain ones in a word of their configuration, or in a weight."""
    run = run_of(tmp_path) / "final"
    file = run / "adapter_config.json"
    config = json.loads(file.read_text())

    def export(out: str, **changes: Any) -> int:
        file.write_text(json.dumps({**config, **changes}))
        return main(["export", str(run), "--to", "vllm", "--out", str(tmp_path / out)])

    assert export("olora", init_lora_weights="olora") == 2
    assert export("prefix", peft_type="PREFIX_TUNING") == 2
    assert "init_lora_weights: olora" in (said := capsys.readouterr().err) and "PREFIX_TUNING" in said
    assert export("pissa", init_lora_weights="pissa") == 0 and (tmp_path / "pissa" / "config.json").is_file()
    tensors = load_file(run / "adapter_model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    more = {"base_model.model.lm_head.weight": base["lm_head.weight"]}
    save_file({**tensors, **more}, run / "adapter_model.safetensors", {"format": "pt"})
    assert export("resized") == 0 and (tmp_path / "resized" / "config.json").is_file()
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, run / "adapter_model.safetensors", {"format": "pt"})
    assert export("broken") == 1 and "infinities or NaN" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in ("olora", "prefix", "broken"))


@pytest.mark.parametrize("form", ["hf", "vllm", "gguf"])
def test_a_whole_model_has_no_adapter_to_keep(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    assert main(["export", str(base), "--to", form, "--adapter", "keep", "--out", str(out)]) == 2
    assert "is a whole model, there is no adapter" in capsys.readouterr().err and not out.exists()


def test_vllm_takes_a_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = save_tiny(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "out"
    assert main(["export", str(base), "--to", "vllm", "--out", str(out)]) == 0
    assert f"vllm serve {out}\n" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"]


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    assert main(["export", str(base), "--to", "hf", "--out", str(tmp_path / "out")]) == 2
    assert "the disk has 0.0 GB free" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_wrong_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base")
    out = ["--out", str(tmp_path / "out")]
    for words, said in (
        ([base, "--to", "hf", "--dtype", "int8", *out], "--dtype int8: for --to hf one of bf16, fp16, fp32"),
        ([base, "--to", "onnx", *out], "--to"),
        ([base, *out], "missing: --to"),
        ([tmp_path / "nowhere" / "at" / "all", "--to", "hf", *out], "there is no folder"),
    ):
        assert main(["export", *map(str, words)]) == 2
        assert said in capsys.readouterr().err
    assert {"hf", "vllm"} <= TARGETS.keys()
