"""Products on AMD's CPUs, on which torch's own ones are slow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from litft.engine.room import host_memory_left
from litft.models import cpu

_ROWS = 16  # for so many the weights are laid out; that suits all other numbers, too
_SHARE = 4  # copies may take this part of the free memory


class Linear(nn.Linear):
    """`nn.Linear` by oneDNN where no gradient is asked for.

    Attributes:
        packed: the weight, or a copy of it as oneDNN wants it.
        version: the weight's when `packed` was made; one that was changed since then is multiplied by torch.
    """

    packed: Tensor
    version: int

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear` has it."""
        fits = input.dtype == self.packed.dtype and input.device.type == "cpu" and input.numel() > 0
        if torch.is_grad_enabled() or not fits or self.weight._version != self.version:
            return super().forward(input)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        return product


def by_onednn(model: nn.Module) -> None:
    """Let a model on an AMD CPU multiply by oneDNN with weights laid out for it, in place.

    torch takes MKL in fp32, which has its fast paths for Intel's CPUs, and lays out 16-bit weights anew each time. On
    an EPYC with AVX-512, for 1, 16 and 64 rows: in fp32 1.9, 2.4 and 2.3 times as fast, in bf16 2.0, 1.5 and 1.2 times.
    The copies stay beside the weights, as long as they take a quarter of the free memory at most; beyond that fp32 is
    multiplied without (1.5 to 2 times as fast).
    """
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not cpu.is_amd() or not there:  # inductor's own operators: no promise that a torch to come has them
        return
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    layers = [layer for layer in linears if type(layer.weight.data) is Tensor and layer.weight.device.type == "cpu"]
    copies = _SHARE * sum(layer.weight.nbytes for layer in layers) <= host_memory_left()
    for layer in layers:
        weight = layer.weight.detach()
        if weight.dtype == torch.float32 or (copies and weight.dtype == torch.bfloat16 and cpu.fast_bf16()):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS) if copies else weight
            layer.__class__ = Linear
            layer.packed, layer.version = packed, layer.weight._version  # type: ignore[assignment]
