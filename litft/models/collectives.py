"""Exchanges between processes that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        grad = grads[0].clone(memory_format=torch.contiguous_format)  # others may have been given the same
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        distributed.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return _AllToAll.apply(grads[0].contiguous(), ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], group: Any) -> Tensor:
        rank = distributed.get_rank(group)
        ctx.begin, ctx.count, ctx.size = sum(counts[:rank]), counts[rank], len(counts)
        padded = x.new_zeros(max(counts))
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(found, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return grads[0][ctx.begin : ctx.begin + ctx.count] * ctx.size, None, None


def copy_to(x: Tensor, group: Any) -> Tensor:
    """`x`, which every process of the group has; each will see a part of its gradient, and these are summed."""
    return _Copy.apply(x, group)


def reduce_from(x: Tensor, group: Any) -> Tensor:
    """The sum of every process's `x`, whose gradient every process has whole."""
    return _Reduce.apply(x, group)


def all_to_all(x: Tensor, group: Any) -> Tensor:
    """Part i of `x` along its first dimension goes to process i, whose part for this one comes in its place."""
    return _AllToAll.apply(x.contiguous(), group)


def gather(x: Tensor, counts: list[int], group: Any) -> Tensor:
    """Every process's numbers [counts of it], one behind the other [sum of counts], for a loss that all compute.

    The gradient of this process's numbers is multiplied by the size of the group: gradients of weights are then
    averaged over it, where those of its processes are parts of a sum.
    """
    return _Gather.apply(x, counts, group)


def from_all_ranks(values: Tensor) -> tuple[Tensor, int]:
    """The values of all processes, in the order of ranks, and where this process's begin; without gradients.

    Args:
        values: [any number].
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return values, 0
    counts = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, torch.tensor([len(values)], device=values.device))
    sizes = [int(count) for count in counts]
    padded = values.new_zeros(max(sizes))
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(found, padded)
    rank = distributed.get_rank()
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)]), sum(sizes[:rank])
