"""`litft doctor`: what it finds here, and what it says of machines that lack something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, running

from litft.cli.main import main
from litft.engine import doctor
from litft.engine.doctor import Finding, examine


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {f"{one.group}/{one.name}": one for one in found}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running() as hub:
        yield hub


def test_as_a_person_runs_it(hub: FakeHub) -> None:
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_" + "s" * 34}
    command = [sys.executable, "-m", "litft", "doctor", "--json"]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert time.monotonic() - began < 60  # about 6 s on a machine with nothing else to do
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    found = by_name([Finding(**one) for one in said["findings"]])
    assert said["can_train"] and found["versions/torch"].text == torch.__version__
    assert found["hub/the model hub"].text.startswith(f"{hub.url} answers")
    assert found["hub/log-in"].text == "a token is set" and "ssss" not in done.stdout + done.stderr
    for name in ("devices/CPU", "fast paths/precision", "fast paths/attention", "fast paths/compile", "extras/test"):
        assert name in found, name
    assert "can't" not in found["devices/a product"].text and hub.asked


def test_the_page_begins_with_what_is_wrong(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    some = [
        Finding("versions", "python", "3.11"),
        Finding("memory and disk", "this folder", "only 0.1 GB free", "problem", "work elsewhere"),
        Finding("fast paths", "compile", "not possible", "note", "apt install g++"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: some)
    assert main(["doctor"]) == 1
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first == "litft can't train here: 1 problem" and "only 0.1 GB" in second and "mend: work elsewhere" in third
    monkeypatch.setattr(doctor, "examine", lambda: [some[0], some[2]])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("litft can train here\nnote    compile: not possible\n") and "apt install g++" in out


def only(monkeypatch: pytest.MonkeyPatch, group: str) -> dict[str, Finding]:
    monkeypatch.setattr(doctor, "CHECKS", [check for check in doctor.CHECKS if check[0] == group])
    return by_name(examine())


def test_offline_is_respected_and_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    found = only(monkeypatch, "none")
    assert found["hub/the model hub"].text.startswith("switched off") and found["hub/the model hub"].state == "ok"


def test_a_hub_that_keeps_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HUB_S", 0.1)
    monkeypatch.setattr(doctor, "_hub", lambda: time.sleep(30))
    began = time.monotonic()
    found = only(monkeypatch, "none")
    assert time.monotonic() - began < 5 and found["hub/the model hub"].state == "note"


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version

    def version(name: str) -> str:
        if name == "gguf":
            raise doctor.metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformers" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = only(monkeypatch, "versions")
    assert found["versions/gguf"].state == "problem" and found["versions/gguf"].mend.startswith("pip install 'gguf")
    assert (
        found["versions/transformers"].state == "problem"
        and "4.0, but litft needs" in found["versions/transformers"].text
    )
    assert found["versions/torch"].state == "ok" and found["versions/imports"].state == "ok"


def test_an_import_that_breaks_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libfoo.so: not there\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    found = only(monkeypatch, "versions")["versions/this check"]
    assert found.state == "problem" and found.text == "failed: OSError: libfoo.so: not there"


@pytest.mark.parametrize(
    ("free", "state"), [(0.5e9, "problem"), (5e9, "note"), (50e9, "ok")], ids=["full", "low", "roomy"]
)
def test_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, state: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("Usage", (), {"free": free}))
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "not" / "there" / "yet"))
    found = only(monkeypatch, "memory and disk")
    assert found["memory and disk/cache of litft"].state == state
    assert ("LITFT_CACHE" in found["memory and disk/cache of litft"].mend) == (state != "ok")
    assert not (tmp_path / "not").exists()  # it only looks


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "file"))
    assert only(monkeypatch, "memory and disk")["memory and disk/cache of litft"].state == "problem"


def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from litft.models import native

    monkeypatch.setattr(native, "compiler", lambda: None)


def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from litft.engine import precision

    monkeypatch.setattr(precision, "fast_bf16", lambda: False)


def _no_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": "/nowhere"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU lacks")
@pytest.mark.parametrize(
    ("take", "name", "said"),
    [
        (_no_compiler, "compile", "no C++ compiler"),
        (_no_compiler, "memory", "no C++ compiler"),
        (_no_headers, "compile", "Python's headers"),
        (_no_bf16, "precision", "32-true"),
    ],
)
def test_what_slows_a_cpu_down(
    monkeypatch: pytest.MonkeyPatch, take: Callable[[pytest.MonkeyPatch], None], name: str, said: str
) -> None:
    take(monkeypatch)
    found = only(monkeypatch, "fast paths")[f"fast paths/{name}"]
    assert found.state == "note" and said in found.text and found.mend
