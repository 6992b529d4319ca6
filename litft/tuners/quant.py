"""Frozen linear layers in 4 or 8 bits (bitsandbytes), and the way back to a plain weight matrix."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
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
        quant: `nf4`: bitsandbytes' 4-bit NormalFloat in blocks of 64 with double quantisation of the scales (Dettmers
            et al. 2023, arXiv:2305.14314), about 0.52 bytes a weight. `int8`: see `Int8Linear`, 1 byte a weight.

    Returns:
        A linear layer, always in `nn.Linear`'s orientation, that answers in its input's dtype.
    """
    weight = weight_matrix(layer).detach().contiguous()
    out_features, in_features = weight.shape
    bias = getattr(layer, "bias", None)
    new: Any
    if quant == "nf4":
        bnb = bitsandbytes()
        new = bnb.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
        )
        new.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=True, module=new
        ).to(weight.device)
        # Otherwise, on some CPUs, the first inference repacks the weight in place and it can't be dequantised any more.
        new.support_avx512bf16_for_cpu = False
    else:
        new = Int8Linear(weight)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new.train(layer.training)


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights and one fp32 scale an output row (absmax / 127).

    Only the weights are rounded, and they are expanded for each product, in the forward and again in the backward
    pass. bitsandbytes' `Linear8bitLt` rounds activations as well, but not in training on a CPU: a model would then be
    trained and used as two different functions.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.float().abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.weight = nn.Parameter((weight.float() / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return _product(x, self, self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class CutLinear(nn.Module):
    """A frozen quantised linear layer whose packed weight looks like a row of bf16 numbers, which FSDP can cut.

    The scales stay whole in every process; they are a thirtieth of the weight.

    Args:
        layer: of `quantise`; its tensors are taken over.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        packed = layer.weight.data.contiguous().view(-1).view(torch.uint8)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.state, self.shape, self.size = getattr(layer.weight, "quant_state", None), layer.weight.shape, len(packed)
        self.weight = nn.Parameter(F.pad(packed, (0, self.size % 2)).view(torch.bfloat16), requires_grad=False)
        if self.state is None:
            self.register_buffer("scale", layer.scale.data, persistent=False)
        self.bias: nn.Parameter | None = layer.bias
        self.training = layer.training

    def matrix(self) -> Tensor:
        """The weight `(out_features, in_features)`; inside of the module's forward pass, when it is gathered."""
        packed = self.weight.detach().view(torch.uint8)[: self.size]
        if self.state is not None:
            found: Tensor = bitsandbytes().functional.dequantize_4bit(packed.view(self.shape), self.state)
            return found
        return _expand(packed.view(torch.int8).view(self.shape), self.scale, torch.float32)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        return _product(x, self, self.bias)

    extra_repr = Int8Linear.extra_repr


def _product(x: Tensor, layer: nn.Module, bias: Tensor | None) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    kept = torch.is_grad_enabled()  # else there is nothing to keep it for, and a compiler can't look into it
    y: Tensor = _QuantisedProduct.apply(x, layer) if kept else F.linear(x, weight_matrix(layer).to(x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def make_cuttable(model: nn.Module) -> None:
    """Put `CutLinear`s in the place of a model's quantised layers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_quantised(child) and not isinstance(child, CutLinear):
                setattr(parent, name, CutLinear(child))


def compute_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """What a frozen layer computes in: autocast's type, else its weights', its input's where they are packed."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return x.dtype if is_quantised(layer) else weight.dtype


def add_product(update: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
    """`update + x W^T` of a frozen layer, summed before anything is rounded; its bias is left out.

    Args:
        update: [..., out].
        x: [..., in], of the same type.
        layer: quantised weights are expanded for the forward and again for the backward pass.
    """
    rows, onto = x.reshape(-1, x.shape[-1]), update.reshape(-1, update.shape[-1])
    if is_quantised(layer) and torch.is_grad_enabled():
        y: Tensor = _QuantisedProduct.apply(rows, layer, onto)
    else:
        y = torch.addmm(onto, rows, weight_matrix(layer).to(x.dtype).T)
    return y.view(update.shape)


class _QuantisedProduct(torch.autograd.Function):
    """`x W^T`, added to an update, that keeps the packed weight for the backward pass, not its expansion."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, update: Tensor | None = None) -> Tensor:
        ctx.layer = layer
        weight = weight_matrix(layer).to(x.dtype)
        return F.linear(x, weight) if update is None else torch.addmm(update, x, weight.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        grad = grads[0]
        d_x = grad @ weight_matrix(ctx.layer).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return d_x, None, grad if len(ctx.needs_input_grad) > 2 and ctx.needs_input_grad[2] else None


def _expand(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale).to(dtype)


def is_quantised(layer: nn.Module) -> bool:
    """Whether the layer's weight is stored as packed integers."""
    if isinstance(layer, CutLinear):
        return True
    weight = layer._parameters.get("weight")
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight as `(out_features, in_features)`: GPT-2's `Conv1D` transposed, a quantised weight dequantised."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, Conv1D):
        return weight.T
    if isinstance(layer, CutLinear):
        return layer.matrix()
    if weight.is_floating_point():
        return weight
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        return bitsandbytes().functional.dequantize_4bit(weight.data, quant_state)
    if isinstance(layer, Int8Linear):
        return _expand(weight, layer.scale, torch.float32)
    raise UserError(
        f"the weights of a quantised {type(layer).__name__} can't be read back\n"
        "load the model in 16 bits and let the qlora tuner quantise it"
    )


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
    return total
