"""Canaries: files that appear as soon as code runs that litft must not run. Counted, and shown to be alive."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import chat_rows, write_jsonl

from litft.cli.main import main

CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--samples.count", "0"]
counts = {"alive": 0, "touched": 0}


class Bait:
    """Unpickled with its code, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


class Canary:
    """A file that isn't there until code runs that shouldn't."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "canary"
        self.shown = False

    @property
    def bait(self) -> Bait:
        """For pickles."""
        return Bait(self.file)

    @property
    def pickle(self) -> bytes:
        """A pickle of nothing else."""
        return pickle.dumps(self.bait)

    @property
    def code(self) -> str:
        """For modules."""
        return f"open({str(self.file)!r}, 'w').close()\n"

    def untouched(self) -> bool:
        return not self.file.exists()

    def would(self, unguarded: Callable[[], Any]) -> None:
        """Show that it would have been touched by something that takes no care."""
        counts["touched"] += self.file.exists()
        assert self.untouched()
        try:
            unguarded()
        finally:
            alive = self.file.exists()
            self.file.unlink(missing_ok=True)
        assert alive, "nothing would have touched this canary: it proves nothing"
        self.shown = True


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """Untouched at the end, and shown to be alive by the test."""
    bird = Canary(tmp_path)
    yield bird
    touched = not bird.untouched()
    counts["touched"] += touched
    counts["alive"] += bird.shown
    assert not touched, "the canary was touched"
    assert bird.shown, "the canary was never shown to be alive"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if counts["alive"]:
        terminalreporter.write_line(f"canaries: {counts['alive']} alive, {counts['touched']} touched")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows(24))


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chats: Path) -> Path:
    """A run of two steps; to be copied."""
    from litft.cli.main import main

    folder = tmp_path_factory.mktemp("run") / "run"
    words = ["--model", tiny_llama, "--data", chats, "--trainer.max_steps", 2, "--out", folder]
    quick = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--samples.count", "0"]
    assert main(["finetune", "lora", *map(str, words), *quick]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of a good model, to be tampered with."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def litft(capsys: pytest.CaptureFixture[str], chats: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line in this process: `code, said = litft("generate", model)`; the rest of the words is filled in.

    `finetune` is a dry run unless there is `--out`.
    """

    def run(verb: str, model: Path | str | None = None, *words: Any, **instead: Any) -> tuple[int, str]:
        import io
        import sys

        argv = [verb]
        if verb == "finetune":
            out = [] if "--out" in words or not instead.get("dry", True) else ["--dry_run"]
            named = [] if model is None else ["--model", str(model)]
            argv += [instead.get("tuner", "lora"), *named, *CPU, *out]
            argv += [] if "--data" in words or "--resume" in words else ["--data", str(chats)]
        elif verb == "chat":
            argv += [str(model), "--max_new_tokens", "2"]
            monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        elif verb == "generate":
            data = "--data" in words
            argv += [str(model), "--max_new_tokens", "2", *([] if data else ["--prompt", "hello"])]
        elif model is not None:
            argv.append(str(model))
        argv += map(str, words)
        monkeypatch.setattr(sys, "argv", ["litft", *argv])
        capsys.readouterr()
        try:
            code = main(argv)
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)
