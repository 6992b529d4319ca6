"""The optimizer's step taken within the backward pass, so that hardly any gradients are alive at the same time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepInBackward:
    """Updates each weight as soon as its gradient is there, and drops the gradient.

    One optimizer over all weights does it: it skips those without a gradient, and only one has any at a time. Moments,
    checkpoints and schedules are those of an ordinary step. A weight whose gradient isn't finite is left alone.

    Args:
        optimizer: over all weights that learn.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer: Any = optimizer
        self.squares: Tensor | None = None
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter: Tensor) -> None:
        norm = torch.linalg.vector_norm(parameter.grad.float())  # type: ignore[union-attr]
        self.squares = norm**2 if self.squares is None else self.squares + norm**2
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()
            self.optimizer.grad_scale = None
        elif not torch.isfinite(norm):
            parameter.grad = None
        self.optimizer.step()
        parameter.grad = None

    def norm(self) -> Tensor:
        """The global norm of the gradients since the last call, a scalar on the device."""
        squares, self.squares = self.squares, None
        return torch.zeros(()) if squares is None else squares.sqrt()
