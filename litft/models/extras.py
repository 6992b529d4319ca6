"""Kernels and number formats of other packages, off by default: float8 products (torchao) and Liger's kernels.

Both are for GPUs and are not yet measured here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from litft.errors import UserError
from litft.models.compiled import layers_of

FLOAT8_CAPABILITY = (8, 9)  # Ada, Hopper and later multiply float8


def use_float8(model: Any, device: torch.device, trains_base: bool) -> int:
    """Let the decoder layers' products run in float8, scaled by tensor (Micikevicius et al. 2022, arXiv:2209.05433).

    Worth it from some 7 billion weights on; the head and products of odd widths stay as they are.

    Args:
        model: a transformers model, before it is compiled.
        device: where it will run.
        trains_base: whether its own weights learn.

    Returns:
        The number of linear layers converted.

    Raises:
        UserError: torchao or such a GPU is missing, or the weights are frozen.
    """
    if not trains_base:
        raise UserError("--model.float8: only for full tuning\nmend: litft finetune full, or leave it out")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise UserError("--model.float8 needs a GPU that multiplies float8 (Ada, Hopper or later)\nmend: leave it out")
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        raise UserError("--model.float8 needs torchao; mend: pip install 'litft[torchao]'") from None
    converted = 0

    def takes(module: nn.Module, name: str) -> bool:
        nonlocal converted
        fits = isinstance(module, nn.Linear) and module.in_features % 16 == module.out_features % 16 == 0
        converted += fits
        return fits

    for layer in layers_of(model):
        convert_to_float8_training(layer, module_filter_fn=takes)
    if not converted:
        raise UserError("--model.float8: none of the model's layers takes it\nmend: leave it out")
    return converted


def use_liger(model: Any, device: torch.device) -> None:
    """Replace norms, rotary embeddings and gated products by Liger's Triton kernels, for models that aren't compiled.

    Args:
        model: a transformers model.
        device: where it will run.

    Raises:
        UserError: the package or a GPU is missing, or it doesn't know the model.
    """
    if device.type != "cuda":
        raise UserError("--model.liger needs a CUDA GPU: its kernels are written in Triton\nmend: leave it out")
    try:
        from liger_kernel.transformers import MODEL_TYPE_TO_APPLY_LIGER_FN
        from transformers.integrations.liger import apply_liger_kernel
    except ImportError:
        raise UserError("--model.liger needs liger-kernel; mend: pip install 'litft[liger]'") from None
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"--model.liger: doesn't know {model.config.model_type} models\nmend: leave it out")
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})  # the loss is litft's own
