"""The commands of tutorials/generate.md and tutorials/serve.md, as printed but for the port, on a tiny model."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from served import heed_interrupts
from test_tutorials import ROOT, blocks
from tiny import save_tiny

from litft.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    save_tiny(folder / "runs" / "mine")
    data = folder / "tutorials" / "data"
    data.mkdir(parents=True)
    lines = (ROOT / "tutorials" / "data" / "quickstart.jsonl").read_text().splitlines(keepends=True)
    (data / "quickstart.jsonl").write_text("".join(lines[:5]))
    (folder / "key.txt").write_text("s3cret\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "litft").write_text(f'#!/bin/bash\nexec {sys.executable} -m litft "$@"\n')
    (folder / "bin" / "litft").chmod(0o755)
    return folder


def start(folder: Path, command: str) -> subprocess.Popen:
    """A command of the shell, in a process group of its own."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )


Run = Callable[..., str]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A litft command, or a Python script, in this process: what it prints."""
    monkeypatch.chdir(folder)

    def run(text: str, typed: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        if text.startswith("litft "):
            assert main(shlex.split(text)[1:]) == 0, text
        else:
            exec(text, {})
        return capsys.readouterr().out

    return run


def test_generate(folder: Path, run: Run) -> None:
    one, file, talk, piped = (block.strip() for block in blocks("bash", "generate"))
    for command in one.splitlines():
        assert run(command)
    run(file)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and {row["messages"][-1]["role"] for row in rows} == {"assistant"}
    assert "Ctrl-D ends" in run(talk)
    typed, _, command = piped.partition(" | ")
    assert run(command, shlex.split(typed)[1].replace("\\n", "\n")).count("model> ") == 2


def test_generate_from_python(run: Run) -> None:
    (script,) = blocks("python", "generate")
    assert run(script).startswith("[")


def test_serve(folder: Path, run: Run) -> None:
    install, curls, _ = blocks("bash", "serve")
    (script,) = blocks("python", "serve")
    server = start(folder, f"exec {install.strip().splitlines()[1]} --port 0")
    try:
        said = server.stdout.readline()  # type: ignore[union-attr]
        url = re.match(r"serving mine at (http://127\.0\.0\.1:\d+), a chat page there too; Ctrl-C ends", said)
        assert url, said
        example = shlex.split(server.stdout.readline())  # type: ignore[union-attr]
        assert example[:3] == ["try:", "python", "-c"] and run(example[3])
        assert run(script.replace("http://127.0.0.1:8000", url[1]))
        if shutil.which("curl"):
            out, _ = start(folder, curls.replace("http://127.0.0.1:8000", url[1])).communicate(timeout=30)
            assert '"object":"text_completion"' in out and '"status":"ok"' in out and "litft_answers_total" in out
    finally:
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=15)
    assert server.returncode == 130 and "Traceback" not in err, err


@pytest.mark.slow
def test_serve_with_a_key(folder: Path) -> None:
    keyed = blocks("bash", "serve")[2].strip()
    server = start(folder, keyed.replace("--port 8080", "--port 0").replace(" litft", " exec litft"))
    try:
        assert "serving mine at http://0.0.0.0" in server.stdout.readline()  # type: ignore[union-attr]
        assert "environ['LITFT_API_KEY']" in server.stdout.readline()  # type: ignore[union-attr]
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=15)
    assert "warning" not in err and server.returncode == -signal.SIGTERM
