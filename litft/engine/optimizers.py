"""Optimizers by short name or class path."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.optim import Optimizer

from litft.errors import UserError

NAMES = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adamw_bf16", "sgd")


def check_name(name: str) -> None:
    """Refuse a name that is neither known nor a class path of a `torch.optim.Optimizer`, the nearest known one named.

    Raises:
        UserError: as said.
    """
    if name in NAMES:
        return
    if "." not in name:
        from difflib import get_close_matches

        near = get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--model.optimizer {name}: not one of {', '.join(NAMES)} and not a class path{hint}")
    _find(name)


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    fused: bool = True,
) -> Optimizer:
    """Make an optimizer.

    Args:
        name: `adamw` and `sgd` (fused), `adamw_8bit` or `paged_adamw_8bit` (bitsandbytes; moments in 8 bits),
            `adamw_bf16` (torchao; weights and moments in bf16, updates rounded stochastically), or the class path of
            any `torch.optim.Optimizer`, which is given `lr` and, where its signature has them, `betas` and
            `weight_decay`.
        groups: parameter groups; their own `lr` and `weight_decay` go before the arguments here.
        lr: learning rate.
        betas: decay rates of the moments.
        weight_decay: decoupled weight decay.
        fused: False where the loss is scaled (fp16): a fused step unscales gradients itself, after they were clipped.

    Raises:
        UserError: for an unknown name, or one whose library is missing.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, weight_decay=weight_decay, fused=fused)
    if name in ("adamw_8bit", "paged_adamw_8bit"):
        try:
            from bitsandbytes import optim
        except ImportError:
            raise UserError(f"--model.optimizer {name} needs bitsandbytes; mend: pip install bitsandbytes") from None
        cls = optim.AdamW8bit if name == "adamw_8bit" else optim.PagedAdamW8bit
        return cls(groups, lr=lr, betas=betas, weight_decay=weight_decay)
    if name == "adamw_bf16":
        try:
            from torchao.optim import _AdamW
        except ImportError:
            raise UserError(f"--model.optimizer {name} needs torchao; mend: pip install 'litft[torchao]'") from None
        adamw: Any = _AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, bf16_stochastic_round=True)
        return adamw
    check_name(name)
    return _by_path(name, groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})


def _by_path(path: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    import inspect

    cls = _find(path)
    taken = inspect.signature(cls).parameters
    try:
        return cls(groups, **{key: value for key, value in options.items() if key in taken})
    except (TypeError, ValueError) as error:
        raise UserError(f"--model.optimizer {path}: doesn't take these parameter groups ({error})") from None


def _find(path: str) -> type[Optimizer]:
    module, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--model.optimizer {path}: cannot be imported ({error})") from None
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise UserError(f"--model.optimizer {path}: not a torch.optim.Optimizer")
    if issubclass(cls, torch.optim.LBFGS):
        raise UserError(
            f"--model.optimizer {path}: evaluates the loss several times a step, which a planned step can't"
        )
    return cls
