"""Whether a method's layers are compiled, and the pass that compiles them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from litft.data.batch import pack_documents
from litft.errors import UserError
from litft.models.attention import opaque_to_compiler
from litft.models.compiled import compile_layers, earns
from litft.models.parts import stored
from litft.models.shard import let_go

if TYPE_CHECKING:
    from litft.methods.base import Method


def wants_compiling(method: Method, device: torch.device) -> bool:
    """Whether the layers are to be compiled: that is asked for, or pays.

    Raises:
        UserError: `compile: true` where it can't be.
    """
    if method.compile_layers == "false":
        return False
    reason = opaque_to_compiler(method.net.model, device, method.compute_dtype is not None)
    sizes = method.parallel.sizes if method.parallel else None
    if sizes and sizes.tensor * sizes.context > 1:
        reason = "processes exchange in the middle of a layer (tensor or context parallelism)"
    elif method.liger:
        reason = "Liger's kernels are for layers that aren't compiled"
    elif method.offloaded:
        reason = "weights come from the host's memory for each pass"
    elif method.recompute == "selective" and not method.tuner.trains_base:
        reason = "adapters and selective recomputing don't go together with it"
    if reason and method.compile_layers == "true":
        raise UserError(f"--model.compile true: {reason}\nmend: leave it at auto")
    wanted = method.compile_layers == "true"
    return not reason and (wanted or earns(method.applied.total, method.run_tokens, device, method.tuner.trains_base))


def compile_if_worth(method: Method) -> None:
    """Compile the model's layers where that is asked for, or pays; the model is on its device.

    Raises:
        UserError: `compile: true` where it can't be.
    """
    model: Any = method.net.model
    device = method.run_device if method.parallel else stored(model.get_input_embeddings()).device
    if method.net.compiled or not wants_compiling(method, device):
        return

    def first_pass() -> None:
        # lengths that are nobody's width: a dimension that equals another one would be taken for it
        documents = [(np.zeros(length, np.int64), np.ones(length, bool)) for length in (41, 32)]
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in pack_documents(documents, 73).items()}
        loss = method.probe(batch)
        if method.parallel:  # what learns is no part of the graph: its gathered stand-in is
            loss.backward()
            method.net.zero_grad()
        else:
            torch.autograd.grad(loss, list(method.trainable_parameters()), allow_unused=True)
        with torch.no_grad():  # as validation runs them
            method.probe(batch)

    import torch._inductor.config

    # in 16 bits fused operations round less often: where two passes are compared, as often as uncompiled ones
    torch._inductor.config.emulate_precision_casts = not method.dropout
    method.net.compiled = True
    method.compiled = compile_layers(model, first_pass)
    method.net.compiled = not method.compiled.failed
    let_go(method.net)
