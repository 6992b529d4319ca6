"""The commands of tutorials/merge-and-export.md and tutorials/quantize.md, as printed but for the model (a tiny one)."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from test_tutorials import Shell, blocks
from tiny import save_tiny
from transformers import AutoModelForCausalLM

TRAINING = "litft finetune lora"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    shell = Shell(tmp_path_factory.mktemp("shell"))
    save_tiny(shell.folder / "model", hidden_size=64)
    shell.script("litft", f'exec {sys.executable} -m litft "$@" $MORE')
    return shell


@pytest.fixture
def run(shell: Shell) -> Callable[[str], str]:
    """Run a block of commands, except that training, which both pages begin with, is done once and takes six steps."""

    def run(block: str) -> str:
        said = ""
        for command in block.strip().splitlines():
            if command.startswith(TRAINING) and (shell.folder / "runs" / "mine" / "final").is_dir():
                continue
            more = f"{shell.env['MORE']} --model model" if command.startswith(TRAINING) else ""
            code, text = shell.run(f"{command} < /dev/null", MORE=more)
            assert code == 0, (command, text)
            said += text
        return said

    return run


def test_merge_and_export(shell: Shell, run: Callable[[str], str]) -> None:
    merge, exact, other, vllm = blocks("bash", "merge-and-export")
    said = run(merge) + run(exact)
    assert said.count("checked: read again by transformers") == 2 and "Ctrl-D ends" in said
    run(other)
    kept = {path.name for path in (shell.folder / "mine-adapter").iterdir()}
    assert "adapter_config.json" in kept and AutoModelForCausalLM.from_pretrained(shell.folder / "mine-fp16")
    said = run(vllm)
    assert "--enable-lora --lora-modules served=" in said and "--max-lora-rank 16" in said
    assert f"vllm serve {shell.folder / 'served-merged'}" in said
    (script,) = blocks("python", "merge-and-export")
    shell.python(script)
    assert (shell.folder / "mine-too" / "config.json").is_file()


def test_quantize(shell: Shell, run: Callable[[str], str]) -> None:
    first, others = blocks("bash", "quantize")
    assert (run(first) + run(others)).count("held-out tokens: ") == 3
    (script,) = blocks("python", "quantize")
    shell.python(script)
    assert (shell.folder / "mine-int8" / "model.safetensors").is_file()
