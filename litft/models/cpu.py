"""What this CPU can do, and how memory is kept on it."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


@functools.cache
def flags() -> frozenset[str]:
    """The CPU's features by Linux's names; empty elsewhere."""
    if platform.system() != "Linux":
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())


@functools.cache
def is_amd() -> bool:
    """Whether AMD made it; known on Linux and Windows."""
    if platform.system() != "Linux":
        return "AuthenticAMD" in platform.processor()
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX, or Arm's bf16 on Linux)."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & flags())


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors free, so that the next step doesn't ask the kernel for every page anew.

    Without it a step on a CPU spends some 15 to 20% of its time on page faults. The process' memory stays at its peak.

    Returns:
        Whether there is a C library that can: glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
    return all(list(map(mallopt, settings.keys(), settings.values())))
