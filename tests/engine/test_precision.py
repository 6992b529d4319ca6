"""The precision that is chosen where none is said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from litft import UserError
from litft.engine import precision
from litft.models import cpu


@pytest.mark.parametrize(
    ("accelerator", "gpu", "gpu_bf16", "cpu_bf16", "expected"),
    [
        ("auto", True, True, False, "bf16-mixed"),
        ("auto", True, False, True, "16-mixed"),
        ("gpu", True, True, False, "bf16-mixed"),
        ("auto", False, False, True, "bf16-mixed"),
        ("auto", False, False, False, "32-true"),
        ("cpu", True, True, False, "32-true"),
        ("cpu", True, False, True, "bf16-mixed"),
    ],
)
def test_default_precision(
    accelerator: str, gpu: bool, gpu_bf16: bool, cpu_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16)
    monkeypatch.setattr(precision, "fast_bf16", lambda: cpu_bf16)
    assert precision.default_precision(accelerator) == expected


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("processor : 0\nflags : fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features : fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx2 avx512f avx512_vnni\n", False),
        ("", False),
    ],
)
def test_fast_bf16_by_the_cpus_flags(cpuinfo: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.platform, "system", lambda: "Linux")
    monkeypatch.setattr(Path, "read_text", lambda self, *a: io.StringIO(cpuinfo).read())
    monkeypatch.setattr(cpu, "flags", cpu.flags.__wrapped__)
    assert cpu.fast_bf16() is fast


NAMES = {"bf16-true": False, "16-true": False, "32-true": True, "64-true": True, "bf16-mixed": True, "16-mixed": True}


@pytest.mark.parametrize("name", [*NAMES, "32"])
def test_h2_only_weights_in_16_bits_are_refused(name: str) -> None:
    refused = ""
    try:
        precision.check_precision(name)
    except UserError as error:
        refused = str(error)
    assert ("bf16-mixed" in refused) != NAMES.get(name, True)
