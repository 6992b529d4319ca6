"""Cutting a model's weights over processes (FSDP2): each holds a part, and gathers a layer while it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from litft.models.compiled import layers_of
from litft.models.parts import cuts_kept

if TYPE_CHECKING:
    from litft.models.mesh import Parallel


def shard(net: nn.Module, parallel: Parallel, compute_dtype: torch.dtype | None) -> None:
    """Cut all weights, in place: a group a decoder layer, and one of what is left (embedding, last norm, head).

    Layers are gathered in the type they compute in, and gradients are summed in fp32. What is left is gathered as it is
    stored, so that the residual stream is what it is on a single device.

    Args:
        net: the module whose forward pass is the root, with backbone and loss head inside.
        parallel: the processes that share the weights.
        compute_dtype: autocast's, None in fp32.
    """
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if parallel.cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {"mesh": parallel.fsdp, "offload_policy": offload}
    plain = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    cast = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    layers = layers_of(net)
    with cuts_kept(net):
        for layer in layers:
            fully_shard(layer, mp_policy=cast, reshard_after_forward=parallel.reshard_after_forward, **options)
        fully_shard(net, mp_policy=plain, **options)
    register_fsdp_forward_method(net, "logits")
    net.register_forward_hook(_let_go)
    for before, layer in itertools.pairwise(layers):  # the next layer's weights come while this one runs
        before.set_modules_to_forward_prefetch([layer])  # type: ignore[operator]
        layer.set_modules_to_backward_prefetch([before])  # type: ignore[operator]


def _let_go(net: nn.Module, *_: Any) -> None:
    """What is kept gathered waits for a backward pass; where none comes, nobody would cut it again."""
    if not torch.is_grad_enabled():
        let_go(net)


def let_go(net: nn.Module) -> None:
    """Cut weights again after passes that had no backward pass; only then are parameters what learns."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def root_gathered(net: nn.Module) -> Iterator[None]:
    """Inside the context the model may be run without the root, as generation does; layers gather themselves."""
    if isinstance(net, FSDPModule):
        net.unshard()
    try:
        yield
    finally:
        let_go(net)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes hold parts of the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
