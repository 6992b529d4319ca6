"""fp32 master weights that learn from the first step on, although the products read them rounded to bf16.

A checkpoint's weights are bf16 numbers. Read into fp32 they lie in the middle of what rounds to them, so that an update
of less than half a bf16 unit in the last place (2e-3 of the weight; a step at a usual learning rate is far less) leaves
the rounded weight as it was: the loss sees nothing of the first steps. Spread evenly over the interval that rounds to
it, the weight is the same in every product, and an update of a tenth of the interval moves a tenth of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from litft.models.compiled import layers_of
from litft.models.parts import local, part_of, stored

HALF = 1 << 15  # of the 16 bits that bf16 lacks
BLOCK = 1 << 22  # random numbers at a time


@torch.no_grad()
def spread_masters(model: Any) -> int:
    """Spread the fp32 weights of linear layers that hold bf16 numbers; the model in bf16 is the same after it.

    The spread depends on a weight's name alone, so that every rank and every run has the same. What is not rounded in
    the products (norms, embeddings, biases) stays, but for a model that processes share, whose layers are gathered in
    bf16 as a whole.

    Args:
        model: a transformers model.

    Returns:
        The number of weights that were spread.
    """
    from litft.tuners.targets import is_linear  # which knows the tuner's layers, which spread theirs

    embedding = stored(model.get_input_embeddings())
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if not is_linear(module) or weight is embedding or weight.dtype != torch.float32 or not weight.requires_grad:
            continue
        found.append((name, weight))
    if isinstance(embedding, DTensor):  # layers are gathered in bf16, their norms and biases with them
        known = {id(weight) for _, weight in found}
        inside = [(name, p) for i, layer in enumerate(layers_of(model)) for name, p in _named(layer, i)]
        found += [
            (name, p) for name, p in inside if id(p) not in known and p.dtype == torch.float32 and p.requires_grad
        ]
    whole = torch.tensor([is_bf16(local(weight)) for _, weight in found], device=embedding.device, dtype=torch.int32)
    if isinstance(embedding, DTensor):  # each process knows of its part only
        torch.distributed.all_reduce(whole, torch.distributed.ReduceOp.MIN)
    spread = 0
    for (name, weight), is_whole in zip(found, whole.tolist(), strict=True):
        if is_whole:
            part = part_of(weight)
            spread_part_(local(weight), name, part.offsets, part.shape)
            spread += weight.numel()
    return spread


def _named(layer: Any, index: int) -> list[tuple[str, Any]]:
    return [(f"layers.{index}.{name}", parameter) for name, parameter in layer.named_parameters()]


@torch.no_grad()
def spread_(weight: Tensor, name: str) -> bool:
    """Spread an fp32 weight in place over what rounds to its bf16 numbers; zeros stay.

    Args:
        weight: [..., any].
        name: what the spread depends on.

    Returns:
        Whether it was: not if it holds more than bf16 numbers.
    """
    if not is_bf16(weight):
        return False
    spread_part_(weight, name, (0,) * weight.ndim, tuple(weight.shape))
    return True


def is_bf16(weight: Tensor) -> bool:
    """Whether an fp32 tensor holds bf16 numbers only."""
    return torch.equal(weight, weight.bfloat16().float())


@torch.no_grad()
def spread_part_(weight: Tensor, name: str, offsets: Sequence[int], shape: Sequence[int]) -> None:
    """Spread a part of a weight as `spread_` does the whole of it.

    Args:
        weight: the part, fp32.
        name: what the spread depends on.
        offsets: where the part begins.
        shape: of the whole.
    """
    rows = max(1, BLOCK // math.prod(shape[1:]))  # the random numbers of a few rows at a time, with a seed for them
    first, last = offsets[0], offsets[0] + weight.shape[0]
    inner = tuple(slice(o, o + n) for o, n in zip(offsets[1:], weight.shape[1:], strict=True))
    for block in range(first // rows, -(-last // rows)):
        begin, end = block * rows, min((block + 1) * rows, shape[0])
        generator = torch.Generator(weight.device).manual_seed(crc32(name.encode()) + block)
        options = {"generator": generator, "dtype": torch.int32, "device": weight.device}
        offset = torch.randint(1 - HALF, HALF, (end - begin, *shape[1:]), **options)  # type: ignore[call-overload]
        mine = slice(max(begin, first), min(end, last))
        part = weight[mine.start - first : mine.stop - first]
        offset = offset[(slice(mine.start - begin, mine.stop - begin), *inner)]
        part.view(torch.int32).add_(offset * (part != 0))
