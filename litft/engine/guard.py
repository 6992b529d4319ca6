"""Gradient clipping, and the guard that keeps a non-finite gradient away from the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from litft.models.parts import cut_of, local

EPSILON = 1e-6  # torch's own clipping adds it to the norm


def clip_and_guard(parameters: Iterable[torch.nn.Parameter], optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Clip gradients by their global norm and make the optimizer skip the step where that norm isn't finite.

    A fused optimizer reads the verdict and the factor on the device (the arguments that loss scaling uses), so no step
    waits for the device and gradients are read once; for others the gradients of a bad step are dropped, and an
    optimizer leaves parameters without one alone.

    Args:
        parameters: what is trained.
        optimizer: the optimizer about to step; its update is skipped whole, moments and weight decay included.
        max_norm: the greatest norm allowed; None doesn't clip.

    Returns:
        The global norm before clipping, a scalar on the device; infinite or NaN where the step is skipped.
    """
    parameters = [p for p in parameters if p.grad is not None]
    sum_partial(parameters)
    norm = global_norm(parameters)
    if getattr(optimizer, "defaults", {}).get("fused"):
        fused: Any = optimizer
        if any(p.device.type == "cpu" for p in parameters):  # offloaded ones read it at once: no copy on its way
            norm = norm.cpu()
        fused.found_inf = (~torch.isfinite(norm)).float()
        # divided by on the way into the update, which saves a pass over all gradients
        fused.grad_scale = ((norm + EPSILON) / max_norm).clamp(min=1.0).float() if max_norm else None
    elif not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
    elif max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def sum_partial(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of which tensor parallelism has left a part in each process; once a step, in one exchange."""
    partial = [p for p in parameters if cut_of(p).partial and p.grad is not None]
    if not partial:
        return
    grads = [local(p.grad) for p in partial if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    torch.distributed.all_reduce(flat, group=cut_of(partial[0]).group)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def global_norm(parameters: Sequence[torch.nn.Parameter]) -> Tensor:
    """The norm of all gradients together, over all processes that have parts of them; `sum_partial` comes before it."""
    cut = [p for p in parameters if cut_of(p).dim is not None]
    if not cut:
        return _norm([p.grad for p in parameters if p.grad is not None])
    squares = _norm([p.grad for p in cut if p.grad is not None]) ** 2
    torch.distributed.all_reduce(squares, group=cut_of(cut[0]).group)
    squares += _norm([p.grad for p in parameters if p.grad is not None and cut_of(p).dim is None]) ** 2
    return squares.sqrt()


def _norm(grads: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
