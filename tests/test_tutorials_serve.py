"""The commands of tutorials/generate.md and tutorials/serve.md, as printed but for the port, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_tutorials import ROOT, blocks
from tiny import save_tiny


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


def start(folder: Path, *words: str, **env: str) -> subprocess.Popen:
    whole = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | env
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, env=whole, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True)


def run(folder: Path, *words: str) -> str:
    process = start(folder, *words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (words, out, err)
    return out


def test_generate(folder: Path) -> None:
    one, file, talk, piped = blocks("bash", "generate")
    for command in one.strip().splitlines():
        assert "error" not in run(folder, "bash", "-c", command)
    run(folder, "bash", "-c", file)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and {row["messages"][-1]["role"] for row in rows} == {"assistant"}
    assert "Ctrl-D ends" in run(folder, "bash", "-c", talk)
    assert run(folder, "bash", "-c", piped).count("model> ") == 2


def test_generate_from_python(folder: Path) -> None:
    (script,) = blocks("python", "generate")
    assert run(folder, sys.executable, "-c", script).startswith("[")


def test_serve(folder: Path) -> None:
    install, curls, keyed = blocks("bash", "serve")
    (script,) = blocks("python", "serve")
    command = install.strip().splitlines()[1] + " --port 0"
    server = start(folder, "bash", "-c", f"exec {command}")
    try:
        said = server.stdout.readline()  # type: ignore[union-attr]
        url = re.match(r"serving mine at (http://127\.0\.0\.1:\d+), a chat page there too; Ctrl-C ends", said)
        assert url, said
        example = server.stdout.readline().removeprefix("try: ")  # type: ignore[union-attr]
        assert run(folder, "bash", "-c", example.replace("python ", f"{sys.executable} ", 1)).strip()
        assert run(folder, sys.executable, "-c", script.replace("http://127.0.0.1:8000", url[1])).strip()
        if shutil.which("curl"):
            out = run(folder, "bash", "-c", curls.replace("http://127.0.0.1:8000", url[1]))
            assert '"object":"text_completion"' in out and '"status":"ok"' in out and "litft_answers_total" in out
    finally:
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=15)
    assert server.returncode == 130 and "Traceback" not in err, err

    open_to_all = start(folder, "bash", "-c", f"{keyed.replace('--port 8080', '--port 0').strip()} & wait")
    try:
        assert "serving mine at http://0.0.0.0" in open_to_all.stdout.readline()  # type: ignore[union-attr]
        assert "environ['LITFT_API_KEY']" in open_to_all.stdout.readline()  # type: ignore[union-attr]
    finally:
        subprocess.run(["pkill", "-TERM", "-P", str(open_to_all.pid)], check=True)
        _, err = open_to_all.communicate(timeout=15)
    assert "warning" not in err
