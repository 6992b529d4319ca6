"""Updates far below what bf16 resolves reach the output in the mean: nothing is rounded before they are added."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from litft.tuners.layers import LoRALinear
from litft.tuners.low_rank import SharedInput
from litft.tuners.quant import quantise


def passed_on(layer: LoRALinear, x: torch.Tensor) -> float:
    """Which part of the update arrives: 1 where all of it does."""
    with torch.no_grad():
        y = layer(x).double()
        b = layer.lora_B.clone()
        layer.lora_B.zero_()
        base = layer(x).double()
        layer.lora_B.copy_(b)
        update = layer.scale * (x.double() @ layer.lora_A.double().T) @ b.double().T
    return float(((y - base) * update).sum() / (update * update).sum())


@pytest.mark.parametrize("kind", ["fused", "plain", "dropout", "nf4", "int8", "nf4 fused", "dora"])
@pytest.mark.parametrize("bias", [False, True])
def test_small_updates_arrive(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    base: nn.Module = nn.Linear(256, 256, bias=bias).bfloat16()
    if "nf4" in kind or kind == "int8":
        base = quantise(base, "int8" if kind == "int8" else "nf4")
    layer = LoRALinear(base, 8, 2.0, dropout=0.1 if kind == "dropout" else 0.0, dora=kind == "dora")
    layer.eval()
    nn.init.normal_(layer.lora_B, std=5e-5)
    if "fused" in kind:
        layer.shared = SharedInput([layer])
    x = torch.randn(512, 256).bfloat16()
    assert abs(passed_on(layer, x) - 1) < 0.15, kind


def test_what_rounding_first_would_lose() -> None:
    """The trap itself, so that the test above is known to see it."""
    torch.manual_seed(0)
    base = nn.Linear(256, 256, bias=False).bfloat16()
    layer = LoRALinear(base, 8, 2.0)
    nn.init.normal_(layer.lora_B, std=5e-5)
    x = torch.randn(512, 256).bfloat16()
    with torch.no_grad():
        update = layer.scale * (x.float() @ layer.lora_A.T) @ layer.lora_B.T
        first = (base(x) + update.bfloat16() - base(x)).float()
    assert float((first * update).sum() / (update * update).sum()) < 0.5
