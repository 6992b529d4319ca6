"""Gradient clipping, and the guard that keeps a non-finite gradient away from the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

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
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
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
