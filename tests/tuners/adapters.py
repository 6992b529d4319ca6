"""What the tuners' tests share: an adapter with every weight moved, ids that hit learning rows, logits."""

from __future__ import annotations

from typing import Any

import torch
from tiny import VOCAB, tiny_model

from litft.tuners import LoRA

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def perturb(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Move every learning weight, so that no factor is zero and no magnitude is the norm it started from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param += scale * torch.randn(param.shape, generator=generator)


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    x = torch.randint(8, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    x[:, 3], x[:, 8] = 5, 7  # the rows that learn in some cases
    return x


@torch.no_grad()
def logits(model: torch.nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    return model.eval()(ids() if x is None else x).logits.float()


def trained(family: str, **options: Any) -> tuple[Any, LoRA]:
    model, tuner = tiny_model(family), LoRA(**{"r": 4, "alpha": 12, **options})
    torch.manual_seed(3)
    tuner.apply(model)
    perturb(model)
    return model, tuner


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()
