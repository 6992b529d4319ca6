"""Learning-rate schedules: a pure function of the optimizer step, so a resumed run cannot drift from a straight one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Name = Literal["cosine", "linear", "constant", "wsd"]
WSD_DECAY = 0.2  # share of the run over which warmup-stable-decay goes down (Hu et al., MiniCPM, 2024: 10 to 20%)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warmup: `warmup` itself from 1 on, below 1 that share of the run, rounded up."""
    share = math.ceil(round(total_steps * warmup, 6))  # 100 * 0.07 is 7.000000000000001
    return min(total_steps, share if warmup < 1 else int(warmup))


def schedule(name: Name, total_steps: int, warmup: float, floor: float = 0.0) -> Callable[[int], float]:
    """The factor on the learning rate at each optimizer step.

    Args:
        name: `cosine` and `linear` fall from 1 to the floor, `constant` stays, `wsd` stays and falls linearly over the
            last fifth.
        total_steps: optimizer steps of the run.
        warmup: steps (from 1 on) or share of the run (below 1) over which the factor rises linearly to 1.
        floor: the factor at the end.

    Returns:
        A function of the 0-based step, never 0 at a step that is made: the floor is reached at step `total_steps`.
    """
    rise = warmup_steps(warmup, total_steps)
    span = max(1, total_steps - rise)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        done = min(1.0, (step - rise) / span)
        if name == "cosine":
            share = (1 + math.cos(math.pi * done)) / 2
        elif name == "linear":
            share = 1 - done
        elif name == "wsd":
            share = min(1.0, (1 - done) / WSD_DECAY)
        else:
            return 1.0
        return floor + (1 - floor) * share

    return factor


class StepSchedule(LRScheduler):
    """Applies a factor to every group's own learning rate.

    Its state is the step alone: on resume the learning rates, the factor and the length of the run are those of the new
    command, never a mixture with the old ones.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float]) -> None:
        self.factor = factor
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at the present step."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a step, with this run's learning rates."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        for group, base, lr in zip(self.optimizer.param_groups, self.base_lrs, self.get_lr(), strict=True):
            group["initial_lr"], group["lr"] = base, lr
        self._last_lr = self.get_lr()
