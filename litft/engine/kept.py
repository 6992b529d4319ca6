"""What a model keeps for its backward pass, shown by two short passes of it: whatever its tuner and attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from litft.data.batch import Batch
from litft.models.recompute import is_kept

LENGTHS = (64, 192)
"""Tokens of the two passes: what grows between them is a token's, the rest is constant."""


@dataclass
class Kept:
    """What a model keeps for its backward pass, in bytes.

    Attributes:
        layers: of each decoder layer, a token's.
        products: of each, results of matrix products and attention alone.
        inputs: of each, its input.
        outside: of everything else, a token's.
        constant: copies of weights and the like.
    """

    layers: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)
    inputs: list[float] = field(default_factory=list)
    outside: float = 0.0
    constant: float = 0.0


class _Watch(TorchDispatchMode):
    """Adds up what is saved for the backward pass, and what products give, by layer; -1 stands for outside of them."""

    def __init__(self, layers: list[nn.Module], known: set[int]) -> None:
        super().__init__()
        self.at, self.known, self.here = -1, set(known), set[int]()
        self.saved, self.products, self.inputs = ([0] * (len(layers) + 1) for _ in range(3))
        self.alive: list[Tensor] = []  # storages, told apart by address, must not be reused

    def gathered(self, module: nn.Module, *_: Any) -> None:
        """Know a module's weights, which sharded ones only are while it runs."""
        self.here = {p.untyped_storage()._cdata for p in module.parameters() if not isinstance(p, DTensor)}
        self.here -= self.known
        self.known |= self.here

    def enter(self, index: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.at = index
            self.gathered(layer)
            first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            self.inputs[index] = first.numel() * first.element_size()

        return hook

    def leave(self, *_: Any) -> None:
        self.at = -1
        self.known -= self.here

    def pack(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive.append(tensor.detach())
            self.saved[self.at] += storage.nbytes()
        # there is no backward pass; and a graph that held the tensors themselves would never be freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if is_kept(func):
            results = found if isinstance(found, (tuple, list)) else [found]
            self.products[self.at] += sum(r.numel() * r.element_size() for r in results if isinstance(r, Tensor))
        return found


def measure(model: nn.Module, layers: list[nn.Module], loss: Callable[[Batch], Tensor], pack: Any) -> Kept:
    """Run two short passes and see what they keep.

    Args:
        model: on its device, its tuner applied, nothing recomputed yet.
        layers: its decoder layers.
        loss: of a micro-batch; called inside the precision's context.
        pack: documents -> micro-batch on the model's device.
    """
    tensors = (t for t in itertools.chain(model.parameters(), model.buffers()) if not isinstance(t, DTensor))
    known = {tensor.untyped_storage()._cdata for tensor in tensors}
    found = []
    for tokens in LENGTHS:
        trained = np.arange(tokens) == tokens - 1
        batch = pack([(np.zeros(tokens, np.int64), trained)])
        watch = _Watch(layers, known)
        handles = [layer.register_forward_pre_hook(watch.enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
        handles += [model.register_forward_pre_hook(watch.gathered)]
        handles += [layer.register_forward_hook(watch.leave) for layer in layers]
        try:
            with (
                torch.random.fork_rng(),
                torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda nothing: nothing),
                watch,
            ):
                loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        found.append(watch)
    few, many = found
    more = LENGTHS[1] - LENGTHS[0]

    def slope(name: str) -> list[float]:
        return [(b - a) / more for a, b in zip(getattr(few, name), getattr(many, name), strict=True)]

    *kept, outside = slope("saved")
    return Kept(
        layers=kept,
        products=slope("products")[:-1],
        inputs=slope("inputs")[:-1],
        outside=outside,
        constant=sum(few.saved) - LENGTHS[0] * (sum(kept) + outside),
    )
