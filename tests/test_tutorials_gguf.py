"""The commands of tutorials/gguf-and-ollama.md, as printed but for the model and the number of steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_tutorials import Shell, blocks

PAGE = "gguf-and-ollama"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    made = Shell(tmp_path_factory.mktemp("gguf"))
    small = f"--model {made.folder / 'model'} $MORE"
    run = f"exec {sys.executable} -m litft"
    lines = f'if [ "$1" = finetune ]; then {run} "$@" {small}; fi'
    base = f'if [ "$2" = smollm2-135m-instruct ]; then shift 2; set -- export {made.folder / "model"} "$@"; fi'
    made.script("litft", f'{lines}\n{base}\n{run} "$@"')
    return made


@pytest.fixture(scope="module")
def run(shell: Shell) -> Path:
    for block in blocks("bash", PAGE):
        for command in block.strip().splitlines():
            code, said = shell.run(command)
            assert code == 0, said
    return shell.folder


@pytest.mark.slow
def test_every_export(run: Path) -> None:
    assert [file.name for file in (run / "mine-gguf").iterdir()] == ["mine-q8_0.gguf"]
    assert [file.name for file in (run / "mine-f16").iterdir()] == ["mine-f16.gguf"]
    assert [file.name for file in (run / "mine-q4").iterdir()] == ["mine-q4_0.gguf"]
    assert [file.name for file in (run / "base-gguf").iterdir()] == ["model-f16.gguf"]
    assert [file.name for file in (run / "mine-lora").iterdir()] == ["mine-lora-f16.gguf"]
    assert sorted(file.name for file in (run / "mine-ollama").iterdir()) == ["Modelfile", "mine-q8_0.gguf"]


@pytest.mark.llamacpp
def test_every_script(run: Path) -> None:
    pytest.importorskip("llama_cpp")
    for script in blocks("python", PAGE):
        done = subprocess.run([sys.executable, "-c", script], cwd=run, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
