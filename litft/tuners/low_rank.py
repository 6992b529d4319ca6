"""Products of frozen weights with low-rank updates, as one operator: nothing full-size is made beside the outputs.

The base's product is added to the update, inside the product, not the other way round: both are then rounded together.
Added to a `W x` that has been rounded, most of an update of less than half a unit in the last place would be lost, and
with it the first steps of a run in bf16. Linear layers that share their input multiply it with all their
down-projections at once, and a frozen weight gets no gradient. The formulas are those of Hu et al. 2021
(arXiv:2106.09685): `y = W x + b + scale * B A x`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from litft.tuners.quant import compute_dtype, is_quantised, weight_matrix


@torch.library.custom_op("litft::low_rank_linears", mutates_args=())
def low_rank_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    down: Tensor,
    ups: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """Linear maps of the same input.

    Args:
        x: [..., in].
        weights: each [out, in], frozen.
        biases: each [out] or None, frozen.
        down: the A of all of them, one below the other [sum of ranks, in].
        ups: the B of each [out, rank].
        scales: the factor on each update.

    Returns:
        Each [..., out], and last what the backward pass wants: `x` times all A [rows, sum of ranks].
    """
    rows = x.reshape(-1, x.shape[-1])
    hidden = rows @ down.t()
    outputs = []
    for weight, bias, up, scale, part in zip(weights, biases, ups, scales, _parts(hidden, ups), strict=True):
        y = F.linear(part, up).addmm_(rows, weight.t(), beta=scale)
        if bias is not None:
            y += bias
        outputs.append(y.view(*x.shape[:-1], len(weight)))
    return [*outputs, hidden]


@torch.library.custom_op("litft::low_rank_linears_backward", mutates_args=())
def low_rank_linears_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    hidden: Tensor,
    scales: Sequence[float],
    to_input: bool,
) -> list[Tensor]:
    """Gradients of the input (empty where nobody wants it), of `down` and of `ups`."""
    rows = x.reshape(-1, x.shape[-1])
    d_hidden = torch.empty_like(hidden)
    d_ups = []
    grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    every = zip(grads, ups, scales, _parts(hidden, ups), _parts(d_hidden, ups), strict=True)
    for grad, up, scale, part, d_part in every:
        d_part.copy_((grad @ up).mul_(scale))
        d_ups.append((grad.t() @ part).mul_(scale))
    d_x = d_hidden @ down if to_input else rows.new_empty(0)
    for grad, weight in zip(grads, weights, strict=True) if to_input else ():
        d_x.addmm_(grad, weight)
    return [d_x.view(x.shape) if to_input else d_x, d_hidden.t() @ rows, *d_ups]


def _parts(hidden: Tensor, ups: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each update."""
    return hidden.split([up.shape[1] for up in ups], dim=1)


@low_rank_linears.register_fake
def _(x: Tensor, weights: Sequence[Tensor], biases: Any, down: Tensor, ups: Any, scales: Any) -> list[Tensor]:
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    return [*outputs, x.new_empty(x.numel() // x.shape[-1], down.shape[0])]


@low_rank_linears_backward.register_fake
def _(
    grads: Any, x: Tensor, weights: Any, down: Tensor, ups: Sequence[Tensor], hidden: Any, scales: Any, to_input: bool
) -> list[Tensor]:
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if to_input else x.new_empty(0)
    return [d_x, torch.empty_like(down), *map(torch.empty_like, ups)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, down, ups, ctx.scales = inputs
    ctx.count = len(weights)
    ctx.d_biases = None if any(bias is None for bias in biases) else [None] * len(biases)  # torch's tree of such lists
    ctx.save_for_backward(x, down, output[-1], *weights, *ups)
    ctx.mark_non_differentiable(output[-1])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    x, down, hidden, *rest = ctx.saved_tensors
    weights, ups = rest[: ctx.count], rest[ctx.count :]
    grads = [g if g is not None else x.new_zeros(*x.shape[:-1], len(w)) for g, w in zip(grads, weights, strict=False)]
    d_x, d_down, *d_ups = low_rank_linears_backward(
        grads, x, weights, down, ups, hidden, ctx.scales, ctx.needs_input_grad[0]
    )
    return d_x if ctx.needs_input_grad[0] else None, [None] * ctx.count, ctx.d_biases, d_down, d_ups, None


low_rank_linears.register_autograd(_backward, setup_context=_keep)


class SharedInput:
    """LoRA layers that are called one after another with the same input; the first call computes all of them.

    Args:
        layers: `LoRALinear`s in the order in which the model calls them.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._waiting: list[Tensor] = []

    def __call__(self, layer: Any, x: Tensor) -> Tensor:
        """What `layer` makes of `x`."""
        if self._waiting and x is self._input and layer is self.layers[-len(self._waiting)]:
            output, *self._waiting = self._waiting
            if not self._waiting:
                self._input = None
            return output
        if layer is not self.layers[0]:  # out of turn: alone
            return _outputs([layer], x)[0]
        output, *self._waiting = _outputs(self.layers, x)
        self._input = x if self._waiting else None
        return output


class _Quantised(torch.autograd.Function):
    """`low_rank_linears` of packed weights, which are expanded for the forward and again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, bases: list[Any], biases: list[Any], scales: list[float], *ups: Tensor
    ) -> tuple[Tensor, ...]:
        *outputs, hidden = low_rank_linears(x, _expanded(bases, x.dtype), biases, down, ups, scales)
        ctx.bases, ctx.scales = bases, scales
        ctx.save_for_backward(x, down, hidden, *ups)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, down, hidden, *ups = ctx.saved_tensors
        weights, to_input = _expanded(ctx.bases, x.dtype), ctx.needs_input_grad[0]
        d_x, d_down, *d_ups = low_rank_linears_backward(grads, x, weights, down, ups, hidden, ctx.scales, to_input)
        return d_x if to_input else None, d_down, None, None, None, *d_ups


def _expanded(bases: list[Any], dtype: torch.dtype) -> list[Tensor]:
    return [weight_matrix(base).to(dtype) for base in bases]


def _outputs(layers: list[Any], x: Tensor) -> list[Tensor]:
    bases = [layer.base_layer for layer in layers]
    x = x.to(compute_dtype(bases[0], x))
    biases = [None if base.bias is None else base.bias.to(x.dtype) for base in bases]
    down = torch.cat([layer.lora_A for layer in layers]).to(x.dtype)
    ups = [layer.lora_B.to(x.dtype) for layer in layers]
    scales = [layer.scale for layer in layers]
    if torch.is_grad_enabled() and any(map(is_quantised, bases)):
        return list(_Quantised.apply(x, down, bases, biases, scales, *ups))
    return low_rank_linears(x, _expanded(bases, x.dtype), biases, down, ups, scales)[:-1]


def share_inputs(model: Any, run: Callable[[Tensor], object] | None = None) -> int:
    """Let the LoRA layers of a model be computed by the fused operator, those with the same input together.

    Which these are shows in a forward pass over two tokens: layers of one parent, called one after another with the
    very same tensor.

    Args:
        model: a transformers model with LoRA applied.
        run: runs it over ids; by default it is called.

    Returns:
        The number of layers taken.
    """
    from litft.tuners.layers import LoRALinear

    layers = {module: name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    fusable = [layer for layer in layers if layer.fusable]
    calls: list[tuple[LoRALinear, Tensor]] = []

    def look(layer: LoRALinear, args: tuple[Tensor, ...]) -> None:
        calls.append((layer, args[0]))

    handles = [layer.register_forward_pre_hook(look) for layer in fusable]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            run(ids) if run else model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[LoRALinear]] = []
    before: Tensor | None = None
    for layer, x in calls:
        if any(layer is one for group in groups for one in group):
            continue  # a layer that is called more than once
        together = x is before and layers[layer].rpartition(".")[0] == layers[groups[-1][-1]].rpartition(".")[0]
        groups.append([*groups.pop(), layer]) if together else groups.append([layer])
        before = x
    for group in groups:
        shared = SharedInput(group)
        for layer in group:
            layer.shared = shared
    return sum(map(len, groups))
