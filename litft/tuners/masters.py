"""fp32 master weights that learn from the first step on, although the products read them rounded to bf16.

A checkpoint's weights are bf16 numbers. Read into fp32 they lie in the middle of what rounds to them, so that an update
of less than half a bf16 unit in the last place (2e-3 of the weight; a step at a usual learning rate is far less) leaves
the rounded weight as it was: the loss sees nothing of the first steps. Spread evenly over the interval that rounds to
it, the weight is the same in every product, and an update of a tenth of the interval moves a tenth of the weights.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Tensor

HALF = 1 << 15  # of the 16 bits that bf16 lacks


@torch.no_grad()
def spread_masters(model: Any) -> int:
    """Spread the fp32 weights of linear layers that hold bf16 numbers; the model in bf16 is the same after it.

    The spread depends on a weight's name alone, so that every rank and every run has the same. What is not rounded in
    the products (norms, embeddings, biases) stays.

    Args:
        model: a transformers model.

    Returns:
        The number of weights that were spread.
    """
    from litft.tuners.targets import is_linear  # which knows the tuner's layers, which spread theirs

    embedding = model.get_input_embeddings().weight
    spread = 0
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not is_linear(module) or weight is embedding or weight.dtype != torch.float32 or not weight.requires_grad:
            continue
        spread += weight.numel() * spread_(weight, name)
    return spread


@torch.no_grad()
def spread_(weight: Tensor, name: str) -> bool:
    """Spread an fp32 weight in place over what rounds to its bf16 numbers; zeros stay.

    Args:
        weight: [..., any].
        name: what the spread depends on.

    Returns:
        Whether it was: not if it holds more than bf16 numbers.
    """
    if not torch.equal(weight, weight.bfloat16().float()):
        return False
    seed = crc32(name.encode())
    generator = torch.Generator(weight.device).manual_seed(seed)
    for row in weight.split(max(1, (1 << 22) // weight.shape[-1])):  # the random numbers of a few rows at a time
        bits = row.view(torch.int32)
        offset = torch.randint(1 - HALF, HALF, row.shape, generator=generator, dtype=torch.int32, device=row.device)
        bits.add_(offset.mul_(row != 0))
    return True
