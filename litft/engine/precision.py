"""The precision that fits the machine."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from litft.errors import UserError


def default_precision(accelerator: str = "auto") -> str:
    """bf16 compute over fp32 trainable weights where the hardware is fast at it, fp16 with loss scaling on older GPUs.

    Args:
        accelerator: Lightning's name of what the run will use.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "cpu") and fast_bf16_cpu():
        return "bf16-mixed"
    return "32-true"


def check_precision(precision: str) -> None:
    """Refuse weights in 16 bits.

    Args:
        precision: Lightning's name.

    Raises:
        UserError: for bf16-true, 16-true and the like.
    """
    if "true" in precision and "32" not in precision and "64" not in precision:
        raise UserError(
            f"precision {precision} rounds away what is learnt (updates below 2^-8 of a weight vanish)\n"
            "mend: bf16-mixed keeps what is trained in fp32 and computes in bf16"
        )


@functools.cache
def fast_bf16_cpu() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX, or Arm's bf16 on Linux)."""
    if platform.system() != "Linux":
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
