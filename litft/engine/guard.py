"""Gradient clipping, and the guard that keeps a non-finite gradient away from the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


def clip_and_guard(parameters: Iterable[torch.nn.Parameter], optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Clip gradients by their global norm and make the optimizer skip the step where that norm isn't finite.

    A fused optimizer reads the verdict on the device (the argument that loss scaling uses), so no step waits for the
    device; for others the gradients of a bad step are dropped, and an optimizer leaves parameters without one alone.

    Args:
        parameters: what is trained.
        optimizer: the optimizer about to step; its update is skipped whole, moments and weight decay included.
        max_norm: the greatest norm allowed; None doesn't clip.

    Returns:
        The global norm before clipping, a scalar on the device; infinite or NaN where the step is skipped.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if getattr(optimizer, "defaults", {}).get("fused"):
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    elif not torch.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        return norm
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
