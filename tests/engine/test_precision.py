"""The precision that is chosen where none is said."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("name", ["bf16-true", "16-true"])
def test_h2_weights_in_16_bits_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="bf16-mixed"):
        precision.check_precision(name)


@pytest.mark.parametrize("name", ["32-true", "64-true", "bf16-mixed", "16-mixed", "32"])
def test_other_precisions_pass(name: Any) -> None:
    precision.check_precision(name)
