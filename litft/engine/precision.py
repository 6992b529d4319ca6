"""The precision that fits the machine."""

from __future__ import annotations

import torch

from litft.errors import UserError
from litft.models.cpu import fast_bf16


def default_precision(accelerator: str = "auto") -> str:
    """bf16 compute over fp32 trainable weights where the hardware is fast at it, fp16 with loss scaling on older GPUs.

    Args:
        accelerator: Lightning's name of what the run will use.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "cpu") and fast_bf16():
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
