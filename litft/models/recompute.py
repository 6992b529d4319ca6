"""Decoder layers that keep less for the backward pass: they run again in it, or leave things in the host's memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"] | int
"""What is run again: nothing, all but matrix products and attention, every layer, or every n-th one."""
T = TypeVar("T")
Offload = Literal["none", "activations", "parameters"]

KEPT = (
    *("aten.mm", "aten.addmm", "aten.bmm", "aten._grouped_mm"),
    *("aten._scaled_dot_product", "torch_attn.", "litft.low_rank", "litft.cpu_"),
)
"""Beginnings of the operators whose results selective recomputing keeps: those that cost the most time."""


def is_kept(operator: Any) -> bool:
    """Whether selective recomputing keeps what the operator (an `OpOverload`) gives."""
    return str(operator).startswith(KEPT)


def recomputed(layers: Sequence[T], how: Recompute) -> Sequence[T]:
    """The layers (or their indices) that run again."""
    if how == "none":
        return []
    return layers[:: how if isinstance(how, int) else 1]


def keep_less(layers: list[nn.Module], how: Recompute, offload: Offload = "none") -> None:
    """Make decoder layers keep less. Once a model, before its layers are compiled and before it goes to its device.

    Offloading implies that every layer runs again: what is left to keep is a layer's input, and its weights are then
    needed only while it runs.

    Args:
        layers: decoder layers, in order.
        how: what is run again.
        offload: `activations`: inputs of layers wait in the host's memory. `parameters`: the layers' weights stay
            there, are fetched for each pass, and their gradients go back.
    """
    for layer in recomputed(layers, "full" if offload != "none" else how):
        forward = layer.forward
        if offload == "parameters":
            forward = _fetching(layer, forward)
            layer._apply = functools.partial(_stays, layer)  # type: ignore[method-assign]
        layer.forward = Again(forward, how == "selective" and offload == "none", offload == "activations")


class Again:
    """A layer's forward pass that runs again in the backward pass.

    Args:
        forward: the pass.
        selective: keep matrix products and attention.
        to_host: the inputs wait in the host's memory.
    """

    def __init__(self, forward: Callable[..., Any], selective: bool = False, to_host: bool = False) -> None:
        self.forward, self.selective, self.to_host = forward, selective, to_host

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        options: dict[str, Any] = {"context_fn": _selective} if self.selective else {}
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if self.to_host else nullcontext():
            return checkpoint(self.forward, *args, use_reentrant=False, **options, **kwargs)


@contextmanager
def all_kept(layers: list[nn.Module]) -> Iterator[None]:
    """Inside the context nothing runs again."""
    before: list[tuple[Any, Again]] = [(layer, layer.forward) for layer in layers if isinstance(layer.forward, Again)]
    try:
        for layer, again in before:
            layer.forward = again.forward
        yield
    finally:
        for layer, again in before:
            layer.forward = again


def _selective() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _stays(layer: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
    """In the place of a layer's `_apply`, by which a model is moved to a device: nothing moves."""
    return layer


def _fetching(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with the layer's weights on the device of its input."""
    body = _Body(layer, forward)
    if torch.cuda.is_available():
        for tensor in itertools.chain(layer.parameters(), layer.buffers()):
            tensor.data = tensor.data.pin_memory()

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        stored = itertools.chain(layer.named_parameters(), layer.named_buffers())
        here = {f"layer.{name}": tensor.to(hidden.device, non_blocking=True) for name, tensor in stored}
        return functional_call(body, here, (hidden, *args), kwargs)

    return run


class _Body(nn.Module):
    """A layer whose call is its own forward pass, past whatever wraps that."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.forward = layer, forward
