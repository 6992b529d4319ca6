"""Frozen linear layers in 4 or 8 bits (bitsandbytes), and the way back to a plain weight matrix."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from litft.errors import UserError

Quant = Literal["nf4", "int8"]


def bitsandbytes() -> ModuleType:
    """The bitsandbytes package.

    Raises:
        UserError: it is not installed, or does not load here.
    """
    try:
        import bitsandbytes as bnb
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"qlora needs bitsandbytes, which does not import here ({error})\n"
            "install it with `pip install 'bitsandbytes>=0.50'`, or use the lora tuner"
        ) from error
    return bnb


def quantise(layer: nn.Module, quant: Quant) -> nn.Module:
    """A frozen quantised copy of `layer` on the same device.

    Args:
        layer: an `nn.Linear` or GPT-2 `Conv1D` with floating-point weights.
        quant: `nf4`: 4-bit NormalFloat in blocks of 64 with double quantisation of the scales (Dettmers et al. 2023,
            arXiv:2305.14314), about 0.52 bytes a weight. `int8`: LLM.int8() (arXiv:2208.07339), 1 byte a weight.

    Returns:
        A `bitsandbytes` linear layer, always in `nn.Linear`'s orientation. It computes in its input's dtype.
    """
    bnb = bitsandbytes()
    weight = weight_matrix(layer).detach().contiguous()
    out_features, in_features = weight.shape
    bias = getattr(layer, "bias", None)
    new: Any
    if quant == "nf4":
        new = bnb.nn.Linear4bit(in_features, out_features, bias=False, quant_type="nf4", device="meta")
        new.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=True, module=new
        ).to(weight.device)
        # Without this it repacks the weight in place at the first inference on some CPUs, and can't be read any more.
        new.support_avx512bf16_for_cpu = False
    else:
        new = bnb.nn.Linear8bitLt(
            in_features, out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        # Int8Params quantises on a move away from the CPU's floating-point copy only.
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new.train(layer.training)


def is_quantised(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored as packed integers."""
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as `(out_features, in_features)`: GPT-2's `Conv1D` transposed, a quantised weight dequantised."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, Conv1D):
        return weight.T
    if weight.is_floating_point():
        return weight
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        return bitsandbytes().functional.dequantize_4bit(weight.data, quant_state)
    scale: Any = getattr(weight, "SCB", None)
    if scale is None:  # moved there by the layer's first forward
        state: Any = layer.state
        scale = state.SCB
    return weight.data.float() * (scale.float() / 127).unsqueeze(1).to(weight.device)


def storage_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters as stored, quantisation constants included."""
    total = 0
    for param in model.parameters():
        total += param.numel() * param.element_size()
        state = getattr(param, "quant_state", None)
        if state is not None:
            inner = state.state2
            scales = [state.absmax] + ([inner.absmax] if inner is not None else [])
            total += sum(scale.numel() * scale.element_size() for scale in scales)
        elif getattr(param, "SCB", None) is not None:
            total += param.SCB.numel() * param.SCB.element_size()  # type: ignore[attr-defined]
    return total
