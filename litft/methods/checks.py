"""What the arguments that all methods have may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litft.engine.optimizers import check_name
from litft.errors import UserError
from litft.methods.memory import check_keys

if TYPE_CHECKING:
    from litft.methods.base import Method


def check_arguments(method: Method) -> None:
    """Refuse values out of range, and those that don't go together.

    Raises:
        UserError: naming the flag.
    """
    names = ("lr", "weight_decay", "warmup", "min_lr", "clip", "balance_experts", "max_bad_steps")
    for name in names:
        value = getattr(method, name)
        if not (value or 0) >= 0:
            raise UserError(f"--model.{name} {value}: must be at least 0")
    if not all(0 <= beta < 1 for beta in method.betas):
        raise UserError(f"--model.betas {list(method.betas)}: must be at least 0 and below 1")
    if method.optimizer_name != "auto":
        check_name(method.optimizer_name)
    check_keys(method.recompute, method.offload, method.memory_gb)
    if method.step_in_backward and method.clip:
        raise UserError(
            f"--model.step_in_backward: can't clip by the global norm (model.clip {method.clip})\nmend: --model.clip 0"
        )
    if method.optimizer_name == "adamw_bf16" and not method.tuner.trains_base:
        raise UserError("--model.optimizer adamw_bf16: adapters stay in fp32\nmend: leave it out")
    if method.min_lr > method.lr:
        raise UserError(f"--model.min_lr {method.min_lr}: is above --model.lr {method.lr}")
