"""The commands of tutorials/merge-and-export.md and tutorials/quantize.md, as printed but for a tiny model."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_tutorials import ROOT, blocks
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from litft.cli.main import main

TRAINING = ["litft", "finetune"]
SMALL = ["--model", "model", "--samples.count", "0", "--trainer.max_steps", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_tiny(folder / "model", hidden_size=64)
    shutil.copytree(ROOT / "tutorials" / "data", folder / "tutorials" / "data")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Run a block of commands; training, with which both pages begin, is done once and takes six steps."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115 - a conversation that ends at once

    def run(block: str) -> str:
        capsys.readouterr()
        for command in block.strip().splitlines():
            words = shlex.split(command)
            if words[:2] == TRAINING and (folder / "runs" / "mine" / "final").is_dir():
                continue
            assert main([*words[1:], *(SMALL if words[:2] == TRAINING else [])]) == 0, command
        return capsys.readouterr().out

    return run


def test_merge_and_export(folder: Path, run: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    merge, exact, other, vllm = blocks("bash", "merge-and-export")
    said = run(merge) + run(exact)
    assert said.count("checked: read again by transformers") == 2 and "Ctrl-D ends" in said
    run(other)
    assert (folder / "mine-adapter" / "adapter_config.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(folder / "mine-fp16")
    said = run(vllm)
    assert "--enable-lora --lora-modules served=" in said and "--max-lora-rank 16" in said
    assert f"vllm serve {folder / 'served-merged'}" in said
    (script,) = blocks("python", "merge-and-export")
    exec(script, {})
    assert (folder / "mine-too" / "config.json").is_file() and "mine-too 14 0.0" in capsys.readouterr().out


def test_quantize(folder: Path, run: Callable[[str], str]) -> None:
    first, others = blocks("bash", "quantize")
    assert (run(first) + run(others)).count("held-out tokens: ") == 3
    (script,) = blocks("python", "quantize")
    exec(script, {})
    assert (folder / "mine-int8" / "model.safetensors").is_file()
